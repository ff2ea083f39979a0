"""What rounding adds in the hosts, against their own order of operations on all rows."""

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file
from sample_report import REPORT
from tiny_family import added, layers_of, load, merge, part_multiplier, tags_of

from hyper_merge.checkpoints.architectures.families.flux import FAMILIES
from hyper_merge.checkpoints.architectures.families.sd1 import SD1
from hyper_merge.checkpoints.architectures.layout import Layer
from hyper_merge.errors import InterruptedRun
from hyper_merge.operations.merge.host_precision import HostLora, measure_precision_loss
from hyper_merge.runs.report import A1111, FORGE_AND_COMFYUI, PrecisionLoss, Report
from hyper_merge.runs.report_text import format_report

FLUX = next(family for family in FAMILIES if family.name == "flux_dev")
ALL = 10**9
ALL_HOSTS = [A1111, FORGE_AND_COMFYUI]


def after_a1111(base, row, loras, layer):
    """Returns the weight of A1111 v1.10.1, as network_lora.py, network.py, networks.py make it.

    A GPU multiplies halves by a number in float32 and rounds the product; `network_apply_weights`
    adds to the weight that the LoRA before has left.
    """
    weight = base[layer.key].flatten(1).half()
    for tag in row:
        module = loras[tag.name]
        if f"{layer.module}.lora_up.weight" not in module:
            continue
        up = module[f"{layer.module}.lora_up.weight"].float().half().flatten(1)
        down = module[f"{layer.module}.lora_down.weight"].float().half().flatten(1)
        updown = (up.double() @ down.double()).half()
        updown = (updown.double() * (module[f"{layer.module}.alpha"].item() / len(down))).half()
        updown = (updown.double() * part_multiplier(tag, layer.part)).half()
        weight = weight + updown  # of halves: a half
    assert weight.dtype == torch.float16
    return weight


def dense(models, merged):
    """Returns the squared errors of both ways and the energies, by checkpoint, in float64."""
    base, loras = load(merged.place.hyper_model), {p.stem: load_file(p) for p in merged.loras}
    errors, energies = torch.zeros(2, len(models)).double(), torch.zeros(len(models)).double()
    for c, (path, row) in enumerate(zip(models, tags_of(merged), strict=True)):
        checkpoint = load(path)
        for layer in layers_of(path):
            weight = base[layer.key].double().flatten(1)
            energies[c] += (checkpoint[layer.key].double().flatten(1) - weight).square().sum()
            exact = weight + sum(
                part_multiplier(tag, layer.part) * added(loras[tag.name], layer.module)
                for tag in row
            )
            for way, rounded in enumerate((after_a1111(base, row, loras, layer), exact.half())):
                errors[way, c] += (rounded.double() - exact).square().sum()
    return errors, energies


def loras_of(merged, count):
    """Returns the arguments of `measure_precision_loss`, read from the files on disk."""
    layers = layers_of(merged.place.hyper_model)
    rows = merged.report.checkpoints
    for block, path in enumerate(merged.loras[:count]):
        tensors = load_file(path)
        pairs = [
            tuple(
                tensors[f"{layer.module}.lora_{which}.weight"].flatten(1)
                if f"{layer.module}.lora_{which}.weight" in tensors
                else torch.zeros(*shape)
                for which, shape in (("up", (layer.m, 0)), ("down", (0, layer.n)))
            )
            for layer in layers
        ]
        multipliers = {
            part: torch.tensor([row.multipliers_of(part)[block] for row in rows])
            for part in ("unet", "text_encoder")
        }
        alpha = next(t.item() for key, t in tensors.items() if key.endswith(".alpha"))
        yield HostLora(pairs, alpha, multipliers)


def estimated(merged, energies, rows):
    base = load_file(merged.place.hyper_model)
    layers = layers_of(merged.place.hyper_model)
    return measure_precision_loss(
        base.__getitem__, SD1, layers, list(loras_of(merged, 9)), energies, rows
    )


@pytest.fixture(scope="module")
def runs(tmp_path_factory, files, merged):
    """The usual merge, and one whose LoRAs and hyper-model the hosts have to round first."""
    folder = tmp_path_factory.mktemp("runs")
    return {
        "float16": merged,
        "float8": merge(files, folder / "8", lora_dtype="float8", dtype="float32"),
    }


@pytest.mark.parametrize("name", ["float16", "float8"])
def test_estimate_of_all_rows_is_exact(files, runs, name):
    errors, energies = dense(files, runs[name])
    losses = estimated(runs[name], energies, ALL)
    assert [loss.hosts for loss in losses] == ALL_HOSTS
    for loss, squares in zip(losses, errors, strict=True):
        assert loss.added == pytest.approx(float(squares.sum() / energies.sum()), rel=1e-3)
        assert loss.worst == pytest.approx(float((squares / energies).max()), rel=1e-3)


@pytest.mark.parametrize("name", ["float16", "float8"])
def test_reported_estimate_of_few_rows_is_near(files, runs, name):
    errors, energies = dense(files, runs[name])
    losses = runs[name].report.rounding
    for loss, other in zip(losses, estimated(runs[name], energies, 8), strict=True):
        assert loss.added == pytest.approx(other.added, rel=1e-4)
    for loss, squares in zip(losses, errors, strict=True):
        assert loss.added == pytest.approx(float(squares.sum() / energies.sum()), rel=0.15)
    one_by_one, once = losses
    assert one_by_one.added > 1.3 * once.added > 0
    assert one_by_one.worst >= one_by_one.added


def test_existing_hyper_model_is_read(files, started):
    again = merge(files, started, overwrite=True)
    assert again.place.exists
    assert [loss.hosts for loss in again.report.rounding] == ALL_HOSTS
    assert all(loss.added > 0 for loss in again.report.rounding)


def test_checkpoint_as_base_is_read(files, tmp_path):
    losses = merge(files[1:], tmp_path, base=str(files[0])).report.rounding
    assert all(0 < loss.added < 1e-2 for loss in losses)


def test_private_lora_is_rounded_last(files, tmp_path):
    settings = {"ranks": (2,), "allocation": "even"}  # all layers have rank and are rounded
    plain = merge(files, tmp_path / "plain", **settings)
    topped = merge(files, tmp_path / "topped", **settings, topup="2")
    assert topped.report.topups
    before, after = (result.report.rounding for result in (plain, topped))
    assert after[0].added > 1.05 * before[0].added
    assert after[1].added == pytest.approx(before[1].added, rel=0.1)


def test_fused_tensor_gives_each_layer_its_rows():
    generator = torch.Generator().manual_seed(0)
    fused = torch.randn(12, 5, generator=generator).half()
    layers = [
        Layer("in_proj", f"te_{i}", "text_encoder", (4, 5), rows=(4 * i, 4 * i + 4))
        for i in range(3)
    ]
    pairs = [
        (torch.randn(4, 2, generator=generator), torch.randn(2, 5, generator=generator))
        for _ in layers
    ]
    lora = HostLora(pairs, 2.0, {"unet": torch.tensor([1.0, -0.5])})
    energies = torch.ones(2).double()
    losses = measure_precision_loss(
        {"in_proj": fused}.__getitem__, FLUX, layers, [lora], energies, ALL
    )
    exact = fused.double() + torch.tensor([1.0, -0.5]).double()[:, None, None] * torch.cat(
        [up.double() @ down.double() for up, down in pairs]
    )
    errors = (exact.bfloat16().double() - exact).square().sum((1, 2))
    (only,) = losses
    assert only.hosts == FORGE_AND_COMFYUI  # A1111 does not run Flux
    assert only.added == pytest.approx(float(errors.sum()) / 2, rel=1e-4)
    assert only.worst == pytest.approx(float(errors.max()), rel=1e-4)


def test_chosen_rows_vary_within_attention_heads():
    seen = []

    class Rows:
        def flatten(self, _):
            return self

        def __getitem__(self, rows):
            if rows != slice(None):
                seen.append(list(range(320))[rows])
                return torch.zeros(len(seen[-1]), 4)
            return self

    lora = HostLora([(torch.ones(320, 1), torch.ones(1, 4))], 1.0, {"unet": torch.ones(1)})
    layer = Layer("q", "q", "unet", (320, 4))
    measure_precision_loss(lambda _: Rows(), SD1, [layer], [lora], torch.ones(1), 8)
    assert 7 <= len(seen[0]) <= 9
    assert len({row % 40 for row in seen[0]}) == len(seen[0])


def test_checkpoints_without_differences_lose_no_precision():
    layer = Layer("q", "q", "unet", (3, 4))
    pairs = [(torch.zeros(3, 0), torch.zeros(0, 4))]
    lora = HostLora(pairs, 1.0, {"unet": torch.zeros(2)})
    weight = {"q": torch.rand(3, 4)}.__getitem__
    losses = measure_precision_loss(weight, SD1, [layer], [lora], torch.zeros(2))
    assert losses == tuple(PrecisionLoss(hosts, 0.0, 0.0) for hosts in ALL_HOSTS)

    def stop():
        raise InterruptedRun("stopped")

    with pytest.raises(InterruptedRun):
        measure_precision_loss(weight, SD1, [layer], [lora], torch.zeros(2), check=stop)


def with_rounding(added_share, loss, hosts=A1111):
    return replace(
        REPORT, loss=loss, rounding=(PrecisionLoss(hosts, added_share, 2 * added_share),)
    )


@pytest.mark.parametrize(
    ("share", "loss", "is_reported"),
    [
        (0.0081, 0.2, True),  # more than a hundredth of 0.8
        (0.0079, 0.2, False),
        (0.0011, 0.01, True),  # more than a tenth of 0.01
        (0.0009, 0.01, False),
        (0.0, 0.0, False),
    ],
)
def test_rounding_is_remarked_on_where_it_takes_much(share, loss, is_reported):
    report = with_rounding(share, loss)
    assert (report.costly_rounding is not None) == is_reported
    assert ("one LoRA per checkpoint is rounded once" in format_report(report)) == is_reported
    assert with_rounding(share, loss, FORGE_AND_COMFYUI).costly_rounding is None


def test_the_table_says_how_each_host_rounds():
    report = replace(
        REPORT,
        loss=0.3,
        rounding=(PrecisionLoss(A1111, 0.0123, 0.02), PrecisionLoss(FORGE_AND_COMFYUI, 1e-4, 3e-4)),
    )
    assert (
        "\nadded to that by rounding, where a program holds the weights in half precision\n"
        "  AUTOMATIC1111, at every LoRA         1.23e-02   worst 2.00e-02\n"
        "  Forge and ComfyUI, once              1.00e-04   worst 3.00e-04\n"
        f"  one LoRA per checkpoint is rounded once: hyper-merge export {report.name}\n"
    ) in format_report(report)
    assert "added to that" not in format_report(REPORT)


def test_old_manifest_has_no_precision_figures():
    report = with_rounding(0.01, 0.2)
    data = json.loads(json.dumps(report.as_dict()))
    assert Report.from_dict(data) == report
    del data["rounding"]
    assert Report.from_dict(data) == replace(report, rounding=())
