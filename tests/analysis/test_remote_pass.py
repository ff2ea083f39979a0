"""A pass whose tensors are analysed elsewhere: the same results, shards that go away, and refusals."""

import os
import pickle

import pytest
import torch
from remote_work import PretendedWorkers
from tiny_family import QUERY, inputs_of, load, run_pass, temporaries, write

from hyper_merge.analysis import remote_pass
from hyper_merge.analysis.cache import analysis_path
from hyper_merge.analysis.remote_checks import require_workers
from hyper_merge.analysis.remote_pass import analyze_on, portable
from hyper_merge.analysis.store import create_analysis
from hyper_merge.analysis.streaming_pass import PassOptions, analyze_in_threads, stream_layers
from hyper_merge.checkpoints.io.mapped_tensors import ReadTensors
from hyper_merge.decomposition import contrasts
from hyper_merge.errors import ClusterError, InterruptedRun, NonFiniteError
from hyper_merge.runtime.progress import Progress

CPU = torch.device("cpu")
OPTIONS = PassOptions(CPU, 0, 12)


def written(folder, inputs, analyze, progress=None):
    """Returns the bytes of an analysis, and the averages."""
    path, averages = analysis_path(folder, inputs, OPTIONS), {}
    with create_analysis(path, inputs, OPTIONS) as writer:
        outside = stream_layers(
            inputs,
            OPTIONS,
            averages.__setitem__,
            writer.keep,
            progress or Progress(),
            analyze,
        )
        writer.close_with(outside)
    return path.read_bytes(), averages


@pytest.mark.parametrize(("slots", "few"), [(1, 16), (5, 16), (2, 1)])
def test_every_bit_is_that_of_a_pass_here(files, tmp_path, monkeypatch, slots, few):
    monkeypatch.setattr(contrasts, "FEW", few)  # slices of which layers keep all
    monkeypatch.setattr(contrasts, "KEPT", 1)
    inputs, workers = inputs_of(files), PretendedWorkers(slots=slots)
    expected, means = written(tmp_path / "here", inputs, analyze_in_threads)
    there = tmp_path / "there"
    there.mkdir()
    analysis, averages = written(there, inputs, analyze_on(workers, there, with_average=True))
    assert analysis == expected
    assert averages.keys() == means.keys()
    assert all(torch.equal(averages[key], mean) for key, mean in means.items())
    assert [path.suffix for path in there.iterdir()] == [".safetensors"]
    keys = [key for chunk in workers.items for key in chunk.keys]
    assert len(keys) == len(set(keys)) > len(workers.items) > 10


def test_averages_and_layers_that_nobody_wants_are_not_written(files, tmp_path, monkeypatch):
    sizes = []
    real = remote_pass.read_shard

    def read(shard):
        sizes.append(shard.path.stat().st_size)
        return real(shard)

    monkeypatch.setattr(remote_pass, "read_shard", read)
    inputs, kept = inputs_of(files), {}
    for width, with_average in ((None, True), (12, False), (12, True)):
        sizes.append(0)
        analyze = analyze_on(PretendedWorkers(), tmp_path, with_average=with_average)
        write_average = (lambda _key, _tensor: None) if with_average else None
        options = PassOptions(CPU, 0, width)
        stream_layers(inputs, options, write_average, lambda layer: None, Progress(), analyze)
        kept[width, with_average] = sum(sizes)
        sizes.clear()
    assert kept[None, True] < kept[12, True]
    assert kept[12, False] < kept[12, True]


def test_inputs_that_travel_are_small_and_mean_the_same_everywhere(files, tmp_path, monkeypatch):
    monkeypatch.chdir(files[0].parent)
    inputs = inputs_of([path.relative_to(files[0].parent) for path in files])
    sent = pickle.dumps(portable(inputs))
    one = pickle.dumps(portable(inputs_of(files[:2])))
    assert len(sent) < 1.02 * len(one)
    monkeypatch.chdir(tmp_path)
    averages, _, _ = run_pass(pickle.loads(sent), width=None)
    expected, _, _ = run_pass(inputs_of(files), width=None)
    assert all(torch.equal(averages[key], mean) for key, mean in expected.items())


@pytest.mark.parametrize("change", ["cut", "flipped", "gone"])
def test_a_shard_that_is_not_what_was_written_is_refused(files, tmp_path, monkeypatch, change):
    real = remote_pass.read_shard

    def read(shard):
        content = bytearray(shard.path.read_bytes())
        content[-1] ^= 1
        if change == "gone":
            shard.path.unlink()
        else:
            shard.path.write_bytes(content[:-4] if change == "cut" else content)
        return real(shard)

    monkeypatch.setattr(remote_pass, "read_shard", read)
    analyze = analyze_on(PretendedWorkers(), tmp_path, with_average=True)
    with pytest.raises(ClusterError, match="is not what a worker has written"):
        stream_layers(inputs_of(files), OPTIONS, lambda *_: None, None, Progress(), analyze)
    assert list(tmp_path.iterdir()) == []


def test_a_refusal_on_a_worker_is_that_of_a_pass_here(files, tmp_path, state_of):
    state = state_of(1)
    state[QUERY] = torch.full_like(state[QUERY], float("nan"))
    spoilt = write(tmp_path / "spoilt.safetensors", state)
    inputs, folder, messages = inputs_of([files[0], spoilt]), tmp_path / "cache", []
    folder.mkdir()
    for analyze in (
        analyze_in_threads,
        analyze_on(PretendedWorkers(), folder, with_average=False),
    ):
        with pytest.raises(NonFiniteError) as caught:
            stream_layers(inputs, OPTIONS, None, lambda _layer: None, Progress(), analyze)
        messages.append(str(caught.value))
    assert messages[0] == messages[1]
    assert list(folder.iterdir()) == []


def test_a_worker_stops_within_a_tensor_and_leaves_no_shard(files, tmp_path):
    checks = []

    def should_stop():
        checks.append(len(list(tmp_path.glob("*.tmp"))))
        return len(checks) == 40

    analyze = analyze_on(PretendedWorkers(), tmp_path, with_average=True)
    progress = Progress(should_stop=should_stop)
    with pytest.raises(InterruptedRun):
        stream_layers(inputs_of(files), OPTIONS, lambda *_: None, None, progress, analyze)
    assert max(checks) == 1
    assert temporaries(tmp_path) == []


def test_files_read_whole_are_those_that_are_mapped(files):
    with ReadTensors(files[0]) as file:
        assert all(torch.equal(file.get(key), t) for key, t in load(files[0]).items())


def test_a_worker_that_does_not_see_a_file_is_refused(files, tmp_path):
    inputs = inputs_of(files)
    require_workers(PretendedWorkers(), inputs, OPTIONS, tmp_path / "new/cache")
    assert list(tmp_path.iterdir()) == []

    class Elsewhere(PretendedWorkers):
        """Workers on whose machine something happens to a file."""

        def __init__(self, happens):
            super().__init__()
            self.happens = happens

        def on_each(self, function, headers, token, text):
            self.happens(token)
            return super().on_each(function, headers, token, text)

    refused = {
        "sees another folder as": lambda token: token.write_text("0"),
        "does not see the folder": lambda token: token.unlink(),
    }
    for message, happens in refused.items():
        with pytest.raises(ClusterError, match=f"the worker pretended {message}.*the same paths"):
            require_workers(Elsewhere(happens), inputs, OPTIONS, tmp_path)
    copy = write(tmp_path / "copy.safetensors", load(files[0]))
    inputs = inputs_of([copy, files[1]])
    os.utime(copy, (1, 1))
    with pytest.raises(ClusterError, match=r"sees another file as .*copy\.safetensors: size or"):
        require_workers(PretendedWorkers(), inputs, OPTIONS, tmp_path)
    copy.unlink()
    with pytest.raises(ClusterError, match=r"does not see .*copy.safetensors \(No such file"):
        require_workers(PretendedWorkers(), inputs, OPTIONS, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_worker_with_too_little_memory_is_refused_by_name(files, tmp_path):
    inputs = inputs_of(files)
    require_workers(PretendedWorkers(memory=2**30), inputs, OPTIONS, tmp_path)
    with pytest.raises(
        ClusterError, match=r"the worker pretended may take 300 MB of .* give each worker \d+ MB or"
    ):
        require_workers(PretendedWorkers(memory=300 * 10**6), inputs, OPTIONS, tmp_path)
