"""Whatever a workflow holds: any value that the host lets through to any input of ours gives a result, or one line.

The host casts each value to the input's type and checks ranges (which NaN passes); the choices of a list it checks not in
every version.  What a node only hands on to the host's own KSampler is the host's to check.
"""
import asyncio

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from test_bad_input import ANYTHING, ERRORS, refused, schedules, snapshot

contract = pytest.importorskip("test_comfyui_contract")
if not hasattr(getattr(contract, "nodes", None), "comfy_entrypoint"):
    pytest.skip("the nodes are not of the form that this test reads", allow_module_level=True)

host = contract.host            # the stand-in: what the nodes ask of a host that is not here
quick = settings(max_examples=400, deadline=None,
                 suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
VALUES = {
    "INT": st.one_of(st.integers(), st.integers(-2, 6)),
    "FLOAT": st.one_of(st.floats(), st.floats(-2, 12), st.sampled_from([np.nan, np.inf, 1e308, -1e-17])),
    "BOOLEAN": st.booleans(),
    "STRING": st.one_of(st.text(), st.sampled_from(["ode", "../x", "\ud800", "a\nb", "{}", "{\"eta\": 1e999}", "1 1\n2 2",
                                                    "1 2\n2 1", "nan nan", "1e400 1", "[" * 5000])),
    "COMBO": ANYTHING}
HANDED_ON = {"seed", "noise_seed", "steps", "cfg", "scheduler", "denoise", "add_noise", "start_at_step", "end_at_step",
             "return_with_leftover_noise"}


def listed():
    return asyncio.run(asyncio.run(contract.nodes.comfy_entrypoint()).get_node_list())


class Model:
    """As much of the host's MODEL as the plot reads."""

    load_device, model_options = "cpu", {}

    def get_model_object(self, name):
        return contract.Eps()


SOCKETS = {"MODEL": Model(), "LATENT": {"samples": torch.zeros(1, 4, 2, 2)}, "CONDITIONING": [], "SIGMAS": None}


def arguments(schema):
    """A value that is allowed for each input."""
    found = {}
    for each in schema.inputs:
        if each.kind in SOCKETS:
            found[each.id] = SOCKETS[each.kind]
        elif "default" in each.options:
            found[each.id] = each.options["default"]
        elif "options" in each.options:
            found[each.id] = each.options["options"][0]
    return found


@pytest.fixture(autouse=True)
def own_presets(monkeypatch, tmp_path):
    monkeypatch.setenv("ERSDE_PRESETS", str(tmp_path / "presets.json"))


def test_every_node_runs_with_its_defaults(host):
    for node in listed():
        schema = node.define_schema()
        assert len(node.execute(**arguments(schema)).args) == len(schema.outputs), schema.node_id


def test_nothing_is_left_patched_in_the_host(host):
    """Building and running a sampler, to its end or to an error, leaves every name of the host's modules as it was."""
    before = snapshot(("comfy", "latent_preview"))
    for preset in ("sde_5", "few_steps", "comfyui"):
        sampler = contract.build(preset)
        sampler.run(contract.Model(contract.Eps()), contract.start("ve"), contract.SIGMAS["ve"], seed=1)
        with pytest.raises(ZeroDivisionError):
            sampler.run(contract.Recorder(contract.Eps(), lambda x, sigma, **_: 1 / 0), contract.start("ve"),
                        contract.SIGMAS["ve"], seed=1)
    assert len(before) > 100 and all(vars(owner).get(name) is value for owner, name, value in before)


def draws(node):
    return node.define_schema().node_id == "ERSDE_Plot"


@quick
@given(st.data())
def test_any_value_in_any_input(host, data):
    node = data.draw(st.sampled_from([node for node in listed() if not draws(node)]))
    schema = node.define_schema()
    given = arguments(schema)
    ours = [each for each in schema.inputs if each.kind in VALUES and each.id not in HANDED_ON]
    for each in data.draw(st.lists(st.sampled_from(ours), min_size=1, max_size=3)):
        given[each.id] = data.draw(VALUES[each.kind])
    refused(lambda: node.execute(**given))


FALLING = st.lists(st.one_of(st.floats(1e-38, 1e38), st.floats(1e-3, 100)), min_size=2, max_size=6).map(
    lambda levels: sorted(levels, reverse=True))


# Drawing is slow, and so would be the search for the shortest failure.
@settings(quick, max_examples=12, phases=[Phase.explicit, Phase.reuse, Phase.generate])
@given(st.one_of(schedules(), FALLING))
def test_any_schedule_in_the_plot(host, levels):
    for plot in filter(draws, listed()):
        given = {**arguments(plot.define_schema()), "sigmas": torch.tensor(levels)}
        try:
            plot.execute(**given)
        except ERRORS as error:
            assert "\n" not in str(error)
