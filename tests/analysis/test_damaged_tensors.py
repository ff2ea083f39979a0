"""A file that lacks data or is off in scale is refused by name before anything is written."""

from dataclasses import replace

import pytest
import torch
from safetensors.torch import save_file
from tiny_family import (
    NORM,
    QUERY,
    WarningLog,
    inputs_of,
    load,
    merge,
    run_pass,
    snapshot,
    write_unfinished,
)

from hyper_merge.analysis.damaged_tensors import Damage, DamagedTensors
from hyper_merge.checkpoints.reader import read_header
from hyper_merge.errors import CheckpointError

REFUSAL = r"spoilt.safetensors lacks data: it holds one value throughout .*download it again"


def matrices_of(path):
    """Keys of all matrices in the order of their data."""
    return [k for k, info in read_header(path).tensors.items() if len(info.shape) > 1]


@pytest.fixture
def spoilt(tmp_path, files):
    """Writes a copy of b with some tensors of one value."""

    def make(keys, value=0.0):
        state = load(files[1])
        state |= {key: torch.full_like(state[key], value) for key in keys}
        save_file(state, tmp_path / "spoilt.safetensors")
        return tmp_path / "spoilt.safetensors"

    return make


@pytest.mark.parametrize("share", [0.3, 0.6, 0.9])
def test_an_unfinished_download_is_refused(tmp_path, files, share):
    models = [
        files[0],
        write_unfinished(tmp_path / "spoilt.safetensors", files[1], share),
        files[2],
    ]
    before = snapshot(tmp_path)
    with pytest.raises(CheckpointError, match=REFUSAL) as refusal:
        merge(models, tmp_path / "out")
    assert refusal.value.file == models[1]
    assert refusal.value.key in read_header(models[1]).tensors
    assert snapshot(tmp_path) == before


def test_the_last_matrix_alone_is_refused(files, spoilt):
    last = next(key for key in reversed(matrices_of(files[1])) if "position_ids" not in key)
    with pytest.raises(CheckpointError, match=REFUSAL) as refusal:
        run_pass(inputs_of([files[0], spoilt([last])]))
    assert refusal.value.key == last


@pytest.mark.parametrize("value", [0.0, 0.25])
def test_more_than_a_handful_of_matrices_is_refused(files, spoilt, value):
    keys = [key for key in matrices_of(files[1]) if "attn" in key][:5]
    with pytest.raises(CheckpointError, match=REFUSAL):
        run_pass(inputs_of([files[0], spoilt(keys, value)]))


def test_few_matrices_are_named_in_a_warning(files, spoilt):
    log = WarningLog()
    run_pass(inputs_of([files[0], spoilt([QUERY])]), progress=log.progress)
    (warning,) = log.warnings
    assert warning == (
        f"spoilt.safetensors holds one value throughout {QUERY}, and the other files do not; compare it"
        " with its source if nobody meant that"
    )


@pytest.mark.parametrize("share", [0.3, 0.9])
def test_an_unfinished_download_is_merged_where_the_user_accepts_it(tmp_path, files, share):
    models = [files[0], write_unfinished(tmp_path / "spoilt.safetensors", files[1], share)]
    accepted, log = WarningLog(), WarningLog()
    merged = merge(models, tmp_path / "out", progress=accepted.progress, damaged="accept")
    assert load(merged.place.hyper_model)
    (warning,) = (text for text in accepted.warnings if "holds one value" in text)
    assert warning.startswith("spoilt.safetensors holds one value throughout ")
    assert (" others, and the other files do not" in warning) == (share == 0.3)
    before = snapshot(tmp_path)
    with pytest.raises(CheckpointError, match=REFUSAL):  # in spite of the analysis that is there
        merge(models, tmp_path / "out", progress=log.progress, name="again")
    assert snapshot(tmp_path) == before


def test_a_base_that_lacks_data_is_refused(files, tmp_path):
    base = write_unfinished(tmp_path / "spoilt.safetensors", files[1], 0.5)
    with pytest.raises(CheckpointError, match=REFUSAL):
        run_pass(inputs_of([files[0], files[2]], base=str(base)))


def test_norms_and_biases_of_one_value_are_good(files, spoilt):
    keys = [k for k, info in read_header(files[1]).tensors.items() if len(info.shape) == 1]
    assert NORM in keys
    log = WarningLog()
    run_pass(inputs_of([files[0], spoilt(keys)]), progress=log.progress)
    assert log.warnings == []


def test_zeros_in_all_files_are_good(files, tmp_path):
    models = []
    for place, path in enumerate(files):
        state = load(path)
        state |= {key: torch.zeros_like(state[key]) for key in matrices_of(path) if "attn" in key}
        models.append(tmp_path / f"{place}.safetensors")
        save_file(state, models[-1])
    log = WarningLog()
    run_pass(inputs_of(models), progress=log.progress)
    assert log.warnings == []


def scaled(path, source, factor, keys):
    """Writes a copy of a file with some tensors multiplied."""
    state = load(source)
    save_file(state | {key: (state[key].float() * factor).half() for key in keys}, path)
    return path


@pytest.mark.parametrize("count", [2, 3])
@pytest.mark.parametrize("key", [QUERY, NORM])
def test_a_tensor_far_too_large_in_one_file_is_refused(tmp_path, files, count, key):
    spoilt = scaled(tmp_path / "spoilt.safetensors", files[1], 9000, [key])
    models, before = [files[0], spoilt, files[2]][:count], snapshot(tmp_path)
    with pytest.raises(CheckpointError) as refusal:
        merge(models, tmp_path / "out")
    assert str(refusal.value).startswith(
        f"spoilt.safetensors is wildly off in scale: values in {key} go up to "
    )
    assert "leave it out; if it is as it should be, set damaged to accept" in str(refusal.value)
    assert (refusal.value.file, refusal.value.key) == (spoilt, key)
    assert snapshot(tmp_path) == before
    log = WarningLog()
    merge(models, tmp_path / "out", progress=log.progress, damaged="accept", dtype="float32")
    (warning,) = (text for text in log.warnings if "larger" in text)
    assert warning.startswith(
        f"spoilt.safetensors holds values a thousand times larger than the other files in {key};"
    )


def test_matrices_far_too_small_in_one_file_count_as_blank(tmp_path, files):
    keys = [key for key in matrices_of(files[1]) if "attn" in key][:5]
    few = scaled(tmp_path / "few.safetensors", files[1], 1e-4, keys[:1])
    log = WarningLog()
    run_pass(inputs_of([files[0], few, files[2]]), progress=log.progress)
    (warning,) = log.warnings
    assert warning == (
        f"few.safetensors holds values a thousand times smaller than the other files in {keys[0]};"
        " compare it with its source if nobody meant that"
    )
    many = scaled(tmp_path / "many.safetensors", files[1], 1e-4, keys)
    with pytest.raises(
        CheckpointError, match=r"many\.safetensors lacks data: it holds nothing above"
    ):
        run_pass(inputs_of([files[0], many, files[2]]))


QUIET = [
    [1.0, 0.3, 4.0],  # as fine-tunes differ
    [0.02, 15.0],  # trained from nothing, and hardly
    [0.0, 0.0, 9.0],  # a bias that is zero as it was initialised
    [1e-7, 1e-3],  # noise
    [300.0, 0.5, 1.0],
    [1e-30, 1e-20, 1e-10],
]


@pytest.mark.parametrize("largest", QUIET)
def test_what_training_does_is_never_damage(files, largest):
    damaged = DamagedTensors(inputs_of(files))
    for key in (QUERY, NORM):
        tensors = [torch.randn(100).clamp(-1, 1) * value for value in largest]
        for tensor, value in zip(tensors, largest, strict=True):
            tensor[7] = value
        found = damaged.find(key, tensors)
        assert [damage.kind for damage in found if damage.kind != "blank"] == []


def test_two_damaged_files_do_not_hide_each_other(files):
    damaged = DamagedTensors(inputs_of(files, damaged="accept"))
    tensors = [torch.randn(100) * factor for factor in (1, 1e5, 1, 1, 1e6)]
    kinds = [(damage.place, damage.kind) for damage in damaged.find(QUERY, tensors)]
    assert kinds == [(1, "huge"), (4, "huge")]


def test_one_flipped_bit_is_seen(files):
    tensors = [torch.randn(100) * 0.05 for _ in range(3)]
    tensors[1].view(torch.int32)[37] ^= 1 << 30  # of the exponent
    with pytest.raises(CheckpointError, match=r"b\.safetensors is wildly off in scale"):
        DamagedTensors(inputs_of(files)).find(QUERY, tensors)


def test_the_order_is_that_of_each_file(files):
    inputs = inputs_of(files)
    header = inputs.headers[1]
    turned = replace(header, tensors=dict(reversed(header.tensors.items())))
    other = DamagedTensors(replace(inputs, headers=(inputs.headers[0], turned)))
    first = next(key for key in header.tensors if key in other._matrices)
    with pytest.raises(CheckpointError, match="its last matrix"):
        other.add(first, [Damage(1, "blank", 0.0, 0.0)])
