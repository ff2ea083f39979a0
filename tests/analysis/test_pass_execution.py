"""The pass in threads and on devices: its progress, its end on request, and its files."""

import pickle
import threading

import pytest
import torch
from tiny_family import NORM, QUERY, inputs_of, load, run_pass, write

from hyper_merge.analysis import layer_analysis, streaming_pass
from hyper_merge.analysis.streaming_pass import (
    PassOptions,
    analyze_tensor,
    pass_costs,
)
from hyper_merge.checkpoints.reader import CheckpointReader
from hyper_merge.errors import (
    CheckpointError,
    InterruptedRun,
)
from hyper_merge.runtime.progress import Progress

CPU = torch.device("cpu")
WIDE = "model.diffusion_model.output_blocks.2.0.in_layers.2.weight"


def test_cpu_takes_layers_beyond_the_devices_memory(files, monkeypatch):
    inputs = inputs_of(files)
    expected = run_pass(inputs)
    real, failed, warnings = layer_analysis.compress, [], []

    def compress(slices, *rest):
        if slices.shape not in failed and len(failed) < 3:
            failed.append(slices.shape)
            raise torch.cuda.OutOfMemoryError("CUDA out of memory (pretended)")
        return real(slices, *rest)

    monkeypatch.setattr(layer_analysis, "compress", compress)
    averages, layers, _ = run_pass(inputs, progress=Progress(warn=warnings.append))
    assert len(failed) == 3
    assert set(warnings) == {"cpu has too little memory for some layers; the CPU took them"}
    assert torch.equal(averages[QUERY], expected[0][QUERY])
    for index, layer in layers.items():
        assert torch.equal(layer.compressed.core, expected[1][index].compressed.core)


def test_pass_reports_progress_and_stops_between_tensors(files):
    reports = []
    stopping = Progress(lambda phase, x: reports.append((phase, x)), lambda: len(reports) == 5)
    with pytest.raises(InterruptedRun):
        run_pass(inputs_of(files), progress=stopping)
    assert len(reports) == 5
    reports.clear()
    run_pass(inputs_of(files), progress=Progress(lambda phase, x: reports.append((phase, x))))
    assert [x for _, x in reports] == sorted(x for _, x in reports)
    assert reports[-1] == ("reading and analysing", 1.0)


@pytest.mark.parametrize("key", [WIDE, QUERY, NORM])
def test_costs_of_a_tensor_are_reported_gradually(files, key, monkeypatch):
    monkeypatch.setattr(streaming_pass, "HOST_CHUNK", 50)
    monkeypatch.setattr(streaming_pass, "_LAYER", 0.0)  # would be nearly all of so small a tensor
    inputs, reports = inputs_of(files), []
    tensors = [load(path)[key] for path in files]
    analyze_tensor(inputs, key, tensors, PassOptions(CPU, 0, 4), reports.append)
    expected = pass_costs(inputs, PassOptions(CPU, 0, 4))[key]
    assert 0.5 * expected < sum(reports) < 1.2 * expected
    if key != NORM:
        assert max(reports) < 0.2 * expected


def test_pass_stops_within_a_tensor(files):
    checks = []

    def should_stop():
        if threading.current_thread() is not threading.main_thread():
            checks.append(threading.get_ident())
        return len(checks) >= 20

    done = []
    with pytest.raises(InterruptedRun):
        run_pass(inputs_of(files), 4, Progress(lambda _phase, x: done.append(x), should_stop))
    assert done[-1] < 0.5
    submitted = max(torch.get_num_threads() + 1, 8) + 1
    assert len(checks) <= 20 + submitted  # once for each item that was


def test_threads_change_no_bit(files):
    inputs = inputs_of(files)
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            results.append(run_pass(inputs, width=8))
            assert torch.get_num_threads() == count
    finally:
        torch.set_num_threads(threads)
    (one, layers, _), (three, others, _) = results
    assert all(torch.equal(one[key], three[key]) for key in one)
    assert all(torch.equal(layers[i].compressed.core, others[i].compressed.core) for i in layers)


def test_analysis_of_a_tensor_can_be_pickled(files):
    inputs = inputs_of(files)
    tensors = [load(path)[QUERY] for path in files]
    sent = pickle.loads(
        pickle.dumps((analyze_tensor, inputs, QUERY, tensors, PassOptions(CPU, 0, 6)))
    )
    here = analyze_tensor(inputs, QUERY, tensors, PassOptions(CPU, 0, 6))
    there = pickle.loads(pickle.dumps(sent[0](*sent[1:])))
    assert torch.equal(here.average, there.average)
    assert torch.equal(here.layers[0].compressed.core, there.layers[0].compressed.core)


def test_file_changed_during_the_pass_is_refused(tmp_path, state_of):
    models = [write(tmp_path / f"{name}.safetensors", state_of(c)) for c, name in enumerate("ab")]
    inputs = inputs_of(models)
    write(models[1], state_of(2) | {"extra": torch.zeros(1)})
    with pytest.raises(CheckpointError, match=r"b\.safetensors was changed while being read"):
        run_pass(inputs)


def test_pass_opens_each_file_once(files, monkeypatch):
    opened = []
    enter = CheckpointReader.__enter__
    monkeypatch.setattr(
        CheckpointReader, "__enter__", lambda self: (opened.append(self.path), enter(self))[1]
    )
    run_pass(inputs_of(files))
    assert opened == list(files)
