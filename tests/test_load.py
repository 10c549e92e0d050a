"""Load: thousands of runs in one process without growth, and eight threads at once, each with the picture it gets alone."""
import gc
import sys
import threading

import pytest
import torch
from problems import flow_schedule, karras, separated

import ersde
from ersde import NOISES, PRESETS, History

JOBS = [(preset, process, kind, seed) for seed, (preset, process, kind) in enumerate(
    (preset, process, kind) for preset in PRESETS for process in ("ve", "flow") for kind in NOISES)]


def resident():
    """Bytes of memory that this process has of the machine's."""
    psutil = pytest.importorskip("psutil")
    return psutil.Process().memory_info().rss


def tensors():
    gc.collect()
    return sum(issubclass(type(one), torch.Tensor) for one in gc.get_objects())


@pytest.mark.slow
def test_ten_thousand_short_runs_do_not_grow():
    """Every preset, both processes, with and without a history, one in ten interrupted; a device too, if there is one."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    x = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0)).to(device)
    schedules = {"ve": torch.tensor([10.0, 2.0, 0.0]), "flow": torch.tensor([1.0, 0.6, 0.0])}

    def model(x, sigma, **_):
        return 0.5 * x

    def stop(info):
        raise InterruptedError

    def runs(count):
        for i in range(count):
            preset, process, kind, seed = JOBS[i % len(JOBS)]
            call = lambda **kw: ersde.sample_preset(model, x, schedules[process], preset, {"seed": seed}, disable=True,
                                                    process=process, noise_sampler=kind if i % 7 == 0 else "cpu", **kw)
            if i % 10 == 0:
                with pytest.raises(InterruptedError):
                    call(callback=stop)
            else:
                call(history=History() if i % 3 else None)

    runs(1000)
    gc.collect()
    before, alive = resident(), tensors()
    on_device = torch.cuda.memory_allocated() if device == "cuda" else 0
    runs(10_000)
    gc.collect()
    assert tensors() <= alive + 5
    # 10,000 runs that kept 1 KiB each, a state, would have 10 MiB more.
    assert resident() - before < 4 << 20
    assert device == "cpu" or torch.cuda.memory_allocated() == on_device


def picture(preset, process, kind, seed):
    model = separated(process, dim=16)
    sigmas = (karras(8) if process == "ve" else flow_schedule(8)).float()
    x = model.start(2, sigmas[0].item(), torch.Generator().manual_seed(seed)).float()
    history, run = History(), lambda x, part: ersde.sample_preset(
        model, x, part, preset, {"seed": seed}, disable=True, process=process, noise_sampler=kind, history=history)
    return run(run(x, sigmas[:5]), sigmas[4:])


def test_eight_threads_at_once():
    want = [picture(*job) for job in JOBS]
    got, failed = {}, []
    start = threading.Barrier(8)

    def work(first):
        try:
            start.wait()
            for i in range(first, len(JOBS) * 2, 8):
                got[i] = picture(*JOBS[i % len(JOBS)])
        except BaseException as error:      # a thread's error would otherwise only be printed
            failed.append(error)

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        threads = [threading.Thread(target=work, args=(i,)) for i in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
    assert not failed and len(got) == 2 * len(JOBS)
    for i, out in got.items():
        assert torch.equal(out, want[i % len(JOBS)]), JOBS[i % len(JOBS)]
