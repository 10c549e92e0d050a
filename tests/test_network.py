"""The trained denoisers: preconditioning, guidance, files; their training and the classifier of their pictures."""
import json
import stat

import pytest
import torch

pytest.importorskip("safetensors")
pytest.importorskip("tqdm")

from safetensors.torch import save_file  # noqa: E402

from benchmarks import classifier, data, train  # noqa: E402
from ersde.demo import network  # noqa: E402
from ersde.demo.network import CLASSES, NULL, SIGMA_DATA, SIZE, Denoiser, Network, guided, load_model  # noqa: E402

# What the stored weights were measured at, with some room.
BOUNDS = {"ve": {0.05: 0.027, 0.2: 0.069, 0.8: 0.167, 3.2: 0.305}, "flow": {0.05: 0.029, 0.2: 0.082, 0.5: 0.19, 0.8: 0.335}}
CLASSES_RIGHT = 0.9
ACCURACY = 0.75
SMALL = dict(channels=(16, 32, 32), blocks=1)
TRAINED = pytest.mark.skipif(not (network.WEIGHTS / "ve.safetensors").is_file(), reason="no weights in this checkout")


def random_network(seed=0, **sizes):
    """A network none of whose layers is at its zero start."""
    torch.manual_seed(seed)
    net = Network(**{**SMALL, **sizes})
    with torch.no_grad():
        for value in net.parameters():
            value.add_(0.05 * torch.randn_like(value))
    return net.eval().requires_grad_(False)


@pytest.fixture(scope="module")
def net():
    return random_network()


def states(count=3, seed=1, dtype=torch.float32):
    return torch.randn(count, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(seed)).to(dtype)


# --- the network and its frames -------------------------------------------------


def test_shapes_and_dtypes(net):
    for process in ("ve", "flow"):
        model = Denoiser(process, net)
        for dtype in (torch.float32, torch.float64):
            out = model(states(dtype=dtype), torch.full((3,), 0.5, dtype=dtype), torch.tensor([0, 4, NULL]))
            assert out.shape == (3, 3, SIZE, SIZE) and out.dtype == dtype
        alike = model(states(), 0.5, torch.tensor([0, 4, NULL]))
        assert torch.allclose(alike.double(), out, atol=1e-4)


def test_pictures_of_a_batch_do_not_see_each_other(net):
    model = Denoiser("ve", net)
    x, sigma, labels = states(), torch.tensor([0.1, 1.0, 10.0]), torch.tensor([1, 2, NULL])
    whole = model(x, sigma, labels)
    for k in range(3):
        assert torch.allclose(whole[k:k + 1], model(x[k:k + 1], sigma[k:k + 1], labels[k:k + 1]), atol=1e-5)


def test_label_and_noise_level_matter(net):
    model = Denoiser("ve", net)
    x = states(1).expand(3, -1, -1, -1)
    by_label = model(x, 1.0, torch.tensor([0, 1, NULL]))
    assert (by_label[0] - by_label[1]).abs().max() > 1e-3 and (by_label[0] - by_label[2]).abs().max() > 1e-3
    inside = net(x, torch.tensor([-1.0, 0.0, 1.0]), torch.zeros(3, dtype=torch.long))
    assert (inside[0] - inside[1]).abs().max() > 1e-3


def test_preconditioning_is_edm_s(net):
    """Against EDM's table 1, written with its own names."""
    model = Denoiser("ve", net)
    x, labels, data_std = states(dtype=torch.float64), torch.tensor([0, 1, 2]), SIGMA_DATA
    for sigma in (0.01, 0.4, 3.0, 80.0):
        c_skip = data_std ** 2 / (sigma ** 2 + data_std ** 2)
        c_out = sigma * data_std / (sigma ** 2 + data_std ** 2) ** 0.5
        c_in = 1 / (sigma ** 2 + data_std ** 2) ** 0.5
        c = torch.tensor(sigma / data_std).log().clamp(-network.LIMIT, network.LIMIT).expand(3)
        expected = c_skip * x + c_out * net((c_in * x).float(), c, labels).double()
        assert torch.allclose(model(x, sigma, labels), expected, atol=1e-5)


def test_both_frames_are_one_map(net):
    """D of `flow` at x is D of `ve` at x / alpha and lambda: the same network sees the same."""
    ve, flow = Denoiser("ve", net), Denoiser("flow", net)
    labels = torch.tensor([0, 5, NULL])
    for sigma in (0.05, 0.5, 0.95):
        x = states(dtype=torch.float64)
        theirs = ve(x / (1 - sigma), sigma / (1 - sigma), labels)
        assert torch.allclose(flow(x, sigma, labels), theirs, atol=1e-4)


def test_flow_is_finite_at_the_ends(net):
    model = Denoiser("flow", net)
    labels = torch.tensor([0, 1, 2])
    for sigma in (1.0, 1 - 1e-7, 1e-6):
        x = states()
        out = model(x, sigma, labels)
        assert torch.isfinite(out).all()
        velocity = model.velocity(x, sigma, labels)
        assert torch.allclose(out, x - sigma * velocity, atol=1e-5)
    assert torch.allclose(model(states(), 1e-6, labels), states(), atol=1e-4)


def test_an_untrained_network_gives_the_best_linear_guess():
    """The last layer starts at zero, so D is the posterior mean for Gaussian data of size s, and F has unit size."""
    torch.manual_seed(0)
    model = Denoiser("flow", Network(**SMALL))
    x = states(1)
    with torch.no_grad():
        out = model(x, 0.3, torch.tensor([0]))
    assert torch.allclose(out, 0.7 * SIGMA_DATA ** 2 / (0.3 ** 2 + (0.7 * SIGMA_DATA) ** 2) * x, atol=1e-5)


@pytest.mark.parametrize("process", ["ve", "flow"])
def test_the_training_losses_are_the_network_s_own_error(process, net):
    """`ve`: mean squared error of F. `flow`: of v; both from a state made by hand."""
    model = Denoiser(process, net)
    g = torch.Generator().manual_seed(3)
    x0, noise = torch.rand(2, 3, SIZE, SIZE, generator=g) * 2 - 1, torch.randn(2, 3, SIZE, SIZE, generator=g)
    sigma, labels = torch.tensor([0.2, 0.9]), torch.tensor([0, 1])
    at = sigma[:, None, None, None]
    alpha = 1 - at if process == "flow" else torch.ones_like(at)
    x = alpha * x0 + at * noise
    _, r, out = model.parts(x, sigma, labels)
    target = at * x0 / (SIGMA_DATA * r) - alpha * SIGMA_DATA * noise / r        # of F, by solving D = x_0
    if process == "flow":
        expected = ((SIGMA_DATA / r) * (out - target)).square().mean((1, 2, 3))
    else:
        expected = (out - target).square().mean((1, 2, 3))
    assert torch.allclose(train.loss_of(model, x0, labels, sigma, noise), expected, rtol=1e-4)


# --- guidance -------------------------------------------------------------------


@pytest.mark.parametrize("process", ["ve", "flow"])
def test_guidance(process, net):
    model = Denoiser(process, net)
    x, sigma = states(), torch.full((3,), 0.6)
    labels = torch.tensor([3, 3, 3])
    with_label, without = model(x, sigma, labels), model(x, sigma, torch.full((3,), NULL))
    for cfg in (0.0, 1.0, 4.0, -1.0):
        expected = without + cfg * (with_label - without)
        for form in ("animal", 3, ["animal"] * 3, labels):
            call = guided(model, form, cfg)
            assert call.process == process
            assert torch.allclose(call(x, sigma), expected, atol=1e-5)
            assert torch.allclose(call(x, sigma[0], extra=1), expected, atol=1e-5)


def test_guidance_of_one_is_one_call(net):
    sizes = []
    model = Denoiser("ve", net)
    model.register_forward_hook(lambda module, given, out: sizes.append(len(out)))
    for cfg in (1.0, 0.0, 2.0):
        guided(model, 0, cfg)(states(2), torch.ones(2))
    assert sizes == [2, 2, 4]


@pytest.mark.parametrize("label, cfg, error", [
    ("anmal", 1.0, "did you mean 'animal'"), (NULL + 1, 1.0, f"between 0 and {NULL}"), ([0, -1], 1.0, "between 0"),
    (0, float("nan"), "cfg must be"), (0, "strong", "cfg must be a number")])
def test_guidance_says_what_is_wrong(net, label, cfg, error):
    with pytest.raises((ValueError, TypeError), match=error):
        guided(Denoiser("ve", net), label, cfg)


# --- files ----------------------------------------------------------------------


def test_a_file_comes_back(tmp_path):
    model = Denoiser("flow", random_network(channels=(32, 64, 48), blocks=2))
    path = tmp_path / "deep" / "mine.safetensors"
    network.save_model(model, path, steps="7")
    assert [file.name for file in path.parent.iterdir()] == [path.name]
    assert path.stat().st_mode & stat.S_IRUSR
    again = load_model(str(path))
    assert again.process == "flow" and again.network.channels == (32, 64, 48) and not again.training
    assert not any(value.requires_grad for value in again.parameters())
    for name, value in model.network.state_dict().items():
        got = again.network.state_dict()[name]
        assert got.dtype == torch.float32 and torch.equal(got, value.half().float())


def _with(path, net, **about):
    about = {"format": network.FORMAT, "process": "ve", "channels": [16, 32, 32], "blocks": 1, "classes": CLASSES, **about}
    about = {name: value for name, value in about.items() if value is not None}
    save_file({name: value.half() for name, value in net.state_dict().items()}, path,
              metadata={network.KEY: json.dumps(about)})


@pytest.mark.parametrize("about", [
    {"format": None}, {"format": "ersde-denoiser-9"}, {"process": "vp"}, {"process": None}, {"blocks": 2},
    {"blocks": True}, {"blocks": 100000}, {"channels": [16, 32, 64]}, {"channels": [16, 32, 99999999]},
    {"channels": "abc"}, {"channels": [16.0, 32, 32]}, {"channels": [16, 32]}, {"classes": ["cat"]}])
def test_files_of_other_kinds_are_named(tmp_path, net, about):
    path = tmp_path / "odd.safetensors"
    _with(path, net, **about)
    with pytest.raises(ValueError, match=r"odd\.safetensors.*benchmarks/train\.py"):
        load_model(path)


@pytest.mark.parametrize("metadata", [None, {}, {"format": "pt"}, {network.KEY: "[1"}, {network.KEY: "[1]"},
                                      {network.KEY: "null"}])
def test_other_safetensors_are_named(tmp_path, metadata):
    save_file({"weight": torch.zeros(2)}, tmp_path / "lora.safetensors", metadata=metadata)
    with pytest.raises(ValueError, match=r"lora\.safetensors is no denoiser of this pack"):
        load_model(tmp_path / "lora.safetensors")


def test_the_plain_file_of_that_test_loads(tmp_path, net):
    _with(tmp_path / "plain.safetensors", net)
    assert load_model(tmp_path / "plain.safetensors").process == "ve"


@pytest.mark.parametrize("content", [b"", b"not safetensors", b"\x80\x02}q\x00.", b"\xff" * 64])
def test_a_file_that_is_no_safetensors_is_named(tmp_path, content):
    path = tmp_path / "pickle.pt"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"pickle\.pt.*'ve', 'flow' or a \.safetensors"):
        load_model(path)


@pytest.mark.parametrize("name", ["nothing.safetensors", "vee", ""])
def test_no_file_is_said(tmp_path, name):
    with pytest.raises(FileNotFoundError, match="a model is 've', 'flow' or"):
        load_model(tmp_path / name)


# --- the training ---------------------------------------------------------------


@pytest.fixture
def few_pictures(monkeypatch, tmp_path):
    g = torch.Generator().manual_seed(0)
    few = data.Pictures(torch.randint(256, (20, 2, 3, SIZE, SIZE), generator=g).to(torch.uint8),
                        torch.arange(10).repeat(2), [str(k) for k in range(20)])
    monkeypatch.setattr(data, "load", lambda split="train": few)
    monkeypatch.setattr(train, "WORK", tmp_path / "work")
    monkeypatch.setattr(train, "WEIGHTS", tmp_path / "weights")
    small = lambda process, whole: Denoiser(process, Network(**SMALL, dropout=whole.middle.dropout))
    monkeypatch.setattr(train, "Denoiser", small)
    monkeypatch.setattr(train, "preview", lambda model, path: None)
    return tmp_path


COMMAND = ["--steps", "4", "--flow-steps", "2", "--batch", "4", "--every", "1", "--device", "cpu"]


@pytest.mark.parametrize("dropout", ["0", "0.2"])
def test_training_stops_and_goes_on_as_if_it_had_not(few_pictures, monkeypatch, capsys, dropout):
    COMMAND = [*globals()["COMMAND"], "--dropout", dropout]
    assert train.main(COMMAND) == 0
    whole = {path.name: path.read_bytes() for path in (few_pictures / "weights").glob("*.safetensors")}
    assert sorted(whole) == ["flow.safetensors", "ve.safetensors"]
    for path in (few_pictures / "work").iterdir():
        path.unlink()

    def stop(*args, real=train.levels, count=iter(range(100))):
        if next(count) == 2:
            raise KeyboardInterrupt
        return real(*args)

    with monkeypatch.context() as patch:
        patch.setattr(train, "levels", stop)
        assert train.main(COMMAND) == 130
    assert "goes on" in capsys.readouterr().err
    assert train.main(COMMAND) == 0
    for name, content in whole.items():
        assert (few_pictures / "weights" / name).read_bytes() == content
    card = (few_pictures / "weights" / "README.md").read_text(encoding="utf-8")
    assert "4 x 4 pictures" in card and "the weights of ve" in card and "Apache License 2.0" in card
    assert train.main([*COMMAND[:1], "5", *COMMAND[2:]]) == 2
    assert "--fresh" in capsys.readouterr().err


def test_flow_alone_says_what_it_starts_from(few_pictures, capsys):
    assert train.main(["--models", "flow", *COMMAND]) == 2
    assert "train ve first" in capsys.readouterr().err
    assert train.main(["--models", "flow", "--flow-from", "nothing", *COMMAND]) == 0


def test_noise_levels_cover_the_range():
    for process in ("ve", "flow"):
        sigma = train.levels(process, 20000, torch.Generator().manual_seed(0))
        assert torch.isfinite(sigma).all() and sigma.min() > 0 and (process == "ve" or sigma.max() < 1)
        lam = sigma / (1 - sigma) if process == "flow" else sigma
        c = (lam / SIGMA_DATA).log()
        assert c.min() < -4.9 and c.max() > 4.9


# --- the pictures' preparation --------------------------------------------------


def _package(folder, version=data.VERSION):
    Image = pytest.importorskip("PIL.Image")
    place = folder / "img" / "google" / "64"
    place.mkdir(parents=True)
    entries = []
    for k, subcategory in enumerate(["face-smiling", "face-costume", "country-flag", "country-flag", "hand-prop"]):
        Image.new("RGBA", (64, 64), (40 * k if k != 3 else 80, 0, 0, 255)).save(place / f"{k}.png")
        entries.append({"unified": f"1F60{k}", "image": f"{k}.png", "subcategory": subcategory, "has_img_google": True})
    entries[4]["skin_variations"] = {"1F3FB": {"unified": "1F604-1F3FB", "image": "5.png", "has_img_google": True}}
    Image.new("RGBA", (64, 64), (0, 0, 0, 0)).save(place / "5.png")
    (folder / "emoji.json").write_text(json.dumps(entries), encoding="utf-8")
    (folder / "package.json").write_text(json.dumps({"name": data.PACKAGE, "version": version}), encoding="utf-8")
    return folder


def test_preparation(tmp_path):
    out = tmp_path / "out.npz"
    data.prepare(_package(tmp_path / "package"), out)
    both = [data.load(split, out) for split in ("train", "held")]
    found = {name: (int(label), images) for one in both for name, label, images in zip(one.names, one.labels, one.images)}
    # The costume has no class, and the second flag is the first one's picture.
    assert {name: CLASSES[label] for name, (label, _) in found.items()} == {
        "1F600": "face", "1F602": "flag", "1F604": "hand", "1F604-1F3FB": "hand"}
    assert found["1F602"][1].shape == (data.VARIANTS, 3, SIZE, SIZE)
    assert (found["1F602"][1][0][0] == 80).all() and (found["1F604-1F3FB"][1] == 255).all()
    # A glyph and its skin tones are on one side of the split.
    assert sum("1F604" in one.names for one in both) == 1
    assert all(("1F604" in one.names) == ("1F604-1F3FB" in one.names) for one in both)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.npz", "package"]


def test_another_package_is_named(tmp_path):
    with pytest.raises(data.DataError, match="there is no"):
        data.prepare(tmp_path / "absent")
    with pytest.raises(data.DataError, match="not emoji-datasource-google 16"):
        data.prepare(_package(tmp_path / "old", "15.0.0"), tmp_path / "out.npz")
    (tmp_path / "empty.tgz").write_bytes(b"no archive")
    with pytest.raises(data.DataError, match="empty.tgz"):
        data.prepare(tmp_path / "empty.tgz")


def test_batches_are_even_over_classes_and_mirror_what_may_be():
    images = torch.zeros(20, 1, 3, SIZE, SIZE, dtype=torch.uint8)
    images[..., 0] = 255
    one = data.Pictures(images, torch.tensor([0] * 11 + list(range(1, 10))), [""] * 20)
    x, labels = one.batch(2000, torch.Generator().manual_seed(0))
    assert x.shape == (2000, 3, SIZE, SIZE) and x.min() == -1 and x.max() == 1
    assert (torch.bincount(labels) - 200).abs().max() < 60
    mirrored = x[:, 0, 0, -1] == 1
    for k, name in enumerate(CLASSES):
        share = mirrored[labels == k].float().mean()
        assert share == 0 if name in ("flag", "sign") else 0.35 < share < 0.65
    again = one.batch(2000, torch.Generator().manual_seed(0))
    assert torch.equal(x, again[0]) and torch.equal(labels, again[1])


# --- what is in the repository --------------------------------------------------


@TRAINED
@pytest.mark.parametrize("process", ["ve", "flow"])
def test_the_weights_are_as_the_card_says(process):
    path = network.WEIGHTS / f"{process}.safetensors"
    if not path.is_file():
        pytest.skip(f"no weights of {process} in this checkout")
    assert path.stat().st_size <= 8e6
    model = load_model(process)
    record = json.loads((network.WEIGHTS / f"{process}.json").read_text(encoding="utf-8"))
    assert model.process == record["process"] == process and record["bytes"] == path.stat().st_size
    assert record["parameters"] == sum(value.numel() for value in model.parameters())
    card = (network.WEIGHTS / "README.md").read_text(encoding="utf-8")
    assert f"{record['loss']:.4f}" in card and f"{record['parameters']:,}" in card and "Apache License" in card


def draw(process, labels, cfg, steps=10, seed=0):
    """Euler's method from noise: what a demo does, short."""
    model = guided(load_model(process), labels, cfg)
    x = torch.randn(len(labels), 3, SIZE, SIZE, generator=torch.Generator().manual_seed(seed))
    if process == "ve":
        sigmas = [*torch.linspace(20 ** (1 / 7), 0.03 ** (1 / 7), steps).pow(7).tolist(), 0.0]
        x = x * sigmas[0]
    else:
        sigmas = [3 * t / (1 + 2 * t) for t in (1 - k / steps for k in range(steps))] + [0.0]
    for now, then in zip(sigmas, sigmas[1:]):
        x = x + (then - now) / now * (x - model(x, torch.full((len(x),), now)))
    return x


@TRAINED
@pytest.mark.parametrize("process", ["ve", "flow"])
def test_the_pictures_are_of_their_classes(process):
    if not (network.WEIGHTS / f"{process}.safetensors").is_file() or not classifier.WEIGHTS.is_file():
        pytest.skip("no weights of it in this checkout")
    labels = torch.arange(len(CLASSES)).repeat(4)
    x = draw(process, labels, 2.0)
    told = classifier.load_classifier().classes(x)
    assert (told == labels).float().mean() >= CLASSES_RIGHT
    # On white paper, in range.
    assert x[:, :, 0, 0].median() > 0.9 and x.abs().max() < 2


@TRAINED
@pytest.mark.parametrize("process", ["ve", "flow"])
def test_the_weights_denoise(process):
    if not (network.WEIGHTS / f"{process}.safetensors").is_file():
        pytest.skip(f"no weights of {process} in this checkout")
    if not data.PREPARED.is_file():
        pytest.skip("the pictures are not prepared: python -m benchmarks.data")
    model = load_model(process)
    pictures = data.load("held")
    x, labels = pictures.batch(40, torch.Generator().manual_seed(0))
    for sigma, error in train.errors(model, x, labels).items():
        assert error < BOUNDS[process][float(sigma)]
        # The label tells something.
        assert error < train.errors(model, x, (labels + 1) % len(CLASSES))[sigma]


def test_the_classifier_is_held_to_its_accuracy():
    if not classifier.WEIGHTS.is_file():
        pytest.skip("no classifier in this checkout")
    model, said = classifier.load_classifier(), classifier.about()["accuracy"]
    assert said >= ACCURACY and classifier.WEIGHTS.stat().st_size < 1.5e6
    features, logits = model(states())
    assert features.shape == (3, classifier.FEATURES) and logits.shape == (3, len(CLASSES)) and (features >= 0).all()
    assert torch.equal(model.features(states().double() * 9), model.features((states() * 9).clamp(-1, 1)))
    if not data.PREPARED.is_file():
        pytest.skip("the accuracy in the file stands; the pictures to measure it on are not prepared")
    assert classifier.accuracy(model, data.load("held")) == pytest.approx(said, abs=0.02)


def test_a_file_that_is_no_classifier_is_named(tmp_path, net):
    with pytest.raises(FileNotFoundError, match="benchmarks.classifier makes it"):
        classifier.load_classifier(tmp_path / "none.safetensors")
    _with(tmp_path / "other.safetensors", net)
    (tmp_path / "junk.safetensors").write_bytes(b"junk")
    for name in ("other", "junk"):
        with pytest.raises(ValueError, match=f"{name}.safetensors is no classifier"):
            classifier.load_classifier(tmp_path / f"{name}.safetensors")
