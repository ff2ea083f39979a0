"""Sensitivities are mean squared gradients of the output, taken in little memory, stopped at once."""

import math
import re
import weakref
from collections import Counter
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from narrow_layouts import NARROW, few, one, two, without, xl
from reference_networks import (
    CLIPS,
    FAMILY,
    OPEN_CLIPS,
    InputLog,
    layout_for,
    narrow_shapes,
    narrow_weights,
    run_diffusers_unet,
    transformers_clip,
    transformers_open_clip,
)
from torch.testing import assert_close

from hyper_merge.calibration import measure
from hyper_merge.calibration.measure import (
    DEFAULT_SAMPLES,
    PHASE,
    Samples,
    can_run,
    measure_sensitivities,
    measuring_cost,
)
from hyper_merge.calibration.network import Network
from hyper_merge.checkpoints.architectures.detection import detect_family
from hyper_merge.checkpoints.io.header import Header, TensorInfo
from hyper_merge.errors import InterruptedRun
from hyper_merge.runtime.progress import Progress
from hyper_merge.synthetic.family_layouts import refiner_layout

FEW = Samples(passes=1, batch=2, side=8)
CPU = torch.device("cpu")
LAYER = "model.diffusion_model.middle_block.1.transformer_blocks.0.attn1.to_v.weight"


def measured(kind, samples=FEW, state=None, shapes=None, progress=None, seed=0):
    """Returns the mean squared gradients by module."""
    sensitivities = measured_whole(kind, samples, state, shapes, progress, seed)
    return {module: sensitivity.mean for module, sensitivity in sensitivities.items()}


def measured_whole(kind, samples=FEW, state=None, shapes=None, progress=None, seed=0):
    shapes = shapes or narrow_shapes(kind)
    layout = layout_for(shapes, FAMILY[kind])
    tensor = (state or narrow_weights(kind)).__getitem__
    return measure_sensitivities(
        tensor, shapes, layout, CPU, progress or Progress(), samples, seed=seed
    )


def first_cotangent(monkeypatch):
    """Returns a list that takes what the first backward pass begins with."""
    backward, taken = torch.autograd.backward, []

    def spy(tensors, gradients=None, *rest, **named):
        taken.append(gradients)
        return backward(tensors, gradients, *rest, **named)

    monkeypatch.setattr(torch.autograd, "backward", spy)
    return taken


def gradients_of_references(kind, state, log, v):
    """Returns by module the gradients of v * output through diffusers and transformers."""
    latents, steps, *_ = log.unet
    leaves = {key: value.clone().requires_grad_() for key, value in state.items()}
    features, pooled, named = [], None, {}
    for prefix, tokens, _ in log.texts:
        of_clip = prefix == CLIPS.get(kind)
        encoder = (transformers_clip if of_clip else transformers_open_clip)(state, prefix)
        result = encoder(tokens, output_hidden_states=True)
        penultimate = kind.startswith("sdxl")
        features.append(result.hidden_states[-2] if penultimate else result.last_hidden_state)
        pooled = result.text_embeds if penultimate and not of_clip else pooled
        start = {CLIPS.get("sdxl"): "lora_te1_", OPEN_CLIPS.get("sdxl"): "lora_te2_"}
        for name, weight in encoder.named_parameters():
            module = start.get(prefix, "lora_te_") + name.removesuffix(".weight").replace(".", "_")
            named[module] = weight
    output = run_diffusers_unet(kind, leaves, latents, steps, torch.cat(features, -1), pooled)
    output.backward(v)
    gradients = {module: weight.grad for module, weight in named.items()}
    for layer in layout_for(narrow_shapes(kind), FAMILY[kind]).layers:
        if layer.part == "unet":
            gradients[layer.module] = leaves[layer.key].grad
    return gradients, output.numel()


@pytest.mark.parametrize("kind", ["sd1", "sdxl"])
def test_sensitivities_are_squared_gradients_of_the_references(kind, monkeypatch):
    log, cotangents = InputLog(monkeypatch), first_cotangent(monkeypatch)
    sensitivities = measured(kind)
    v = cotangents[0]
    monkeypatch.undo()
    squares = Counter()
    for place in range(len(v)):  # one input at a time
        own = torch.zeros_like(v)
        own[place] = v[place]
        gradients, outputs = gradients_of_references(kind, narrow_weights(kind), log, own)
        for module, gradient in gradients.items():
            squares[module] += 0 if gradient is None else float(gradient.double().square().sum())
    layers = layout_for(narrow_shapes(kind), FAMILY[kind]).layers
    assert [layer.module for layer in layers] == list(sensitivities)
    expected = {}
    for layer in layers:
        expected[layer.module] = squares[layer.module] / (outputs * layer.m * layer.n)
    assert any(layer.rows for layer in layers) == (kind == "sdxl")  # of a fused tensor
    for module, value in sensitivities.items():
        assert value == pytest.approx(expected[module], rel=1e-3, abs=1e-12), module


def test_sensitivities_foretell_changes_of_the_output():
    """Of a random direction by the mean, of the most sensitive one by the stretches."""
    kind, layer, step = "small", LAYER, 1e-2
    shapes, state = narrow_shapes(kind), narrow_weights(kind)
    samples = Samples(passes=8, batch=1, side=8)
    (module,) = (x.module for x in layout_for(shapes, FAMILY[kind]).layers if x.key == layer)
    expected = measured_whole(kind, samples)[module]
    steps = (torch.arange(8) + 0.5) * (1000 / 8)

    def outputs(weights):
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            return Network(weights.__getitem__, shapes, FAMILY[kind]).run(steps, 8, generator)

    generator, base = torch.Generator().manual_seed(7), outputs(state)

    def effect(change):
        """Returns the mean squared change of an output, by the size of the change."""
        changed = outputs({**state, layer: state[layer] + step * change})
        return float((changed - base).square().mean()) / step**2

    random = [torch.randn(state[layer].shape, generator=generator) for _ in range(3)]
    mean = expected.mean * state[layer].numel()
    assert sum(map(effect, random)) / 3 == pytest.approx(mean, rel=0.35)
    left, right = (
        side.directions[:, int(side.factors.argmax())].float()
        for side in (expected.left, expected.right)
    )
    leading = torch.outer(left, right) * state[layer].numel() ** 0.5
    assert effect(leading) > 5 * mean
    largest = float(expected.left.factors.max() * expected.right.factors.max()) ** 2
    assert effect(leading) == pytest.approx(expected.rest * largest * mean, rel=0.8)


def test_layer_that_nothing_reads_counts_nothing():
    sensitivities = measured("sdxl")
    idle = {module for module, value in sensitivities.items() if value == 0}
    assert idle == {
        module
        for module in sensitivities
        if module.startswith("lora_te1_text_model_encoder_layers_2_")
    }  # the UNet reads the layer before; that of the second encoder is pooled
    assert len(idle) == 6


def test_layers_count_by_the_seed_of_their_inputs():
    first = measured("small")
    assert measured("small", seed=0) == first
    other = measured("small", seed=1)
    assert other != first
    assert other[next(iter(other))] == pytest.approx(first[next(iter(first))], rel=0.9)


def test_weights_of_other_types_are_read_as_numbers():
    state = {key: value.bfloat16() for key, value in narrow_weights("small").items()}
    rounded = {key: value.float() for key, value in state.items()}
    assert measured("small", state=state) == measured("small", state=rounded)


# memory and interrupts


def test_a_run_holds_the_weights_of_one_block(monkeypatch):
    alive, peaks, read = {}, [], measure._Observer.read

    def spy(observer, key):
        weight = read(observer, key)
        token = len(peaks)
        alive[token] = weight.numel()
        weakref.finalize(weight, alive.pop, token)
        peaks.append(sum(alive.values()))
        return weight

    monkeypatch.setattr(measure._Observer, "read", spy)
    # of another type, so that what is read is not what the state holds
    measured("sdxl", state={key: x.half() for key, x in narrow_weights("sdxl").items()})
    numels = {key: math.prod(shape) for key, shape in narrow_shapes("sdxl").items()}
    blocks = Counter()
    for key, numel in numels.items():
        if block := re.match(r"(.*transformer_blocks\.\d+|.*_blocks?\.\d+(\.\d+)?)\.", key):
            blocks[block[0]] += numel
    ends = sum(n for key, n in numels.items() if "time_embed" in key or "label_emb" in key)
    assert max(peaks) < max(blocks.values()) + 1.1 * ends
    assert max(peaks) < 0.15 * sum(numels.values())
    assert not alive


class StopAt:
    """Asks for a stop at the n-th check, and counts those that follow."""

    def __init__(self, at):
        self.at, self.checks = at, 0

    def should_stop(self):
        self.checks += 1
        return self.checks >= self.at


@pytest.mark.parametrize("share", [0.02, 0.3, 0.55, 0.8, 0.99])
def test_a_pass_stops_at_once_on_request(share):
    whole = StopAt(10**9)
    measured("small", progress=Progress(should_stop=whole.should_stop))
    stop = StopAt(int(share * whole.checks))
    with pytest.raises(InterruptedRun):
        measured("small", progress=Progress(should_stop=stop.should_stop))
    assert stop.checks == stop.at


@pytest.mark.parametrize("error", [KeyboardInterrupt, InterruptedRun, OSError])
@pytest.mark.parametrize("where", ["read", "take"])
def test_errors_within_the_backward_pass_keep_their_kind(error, where, monkeypatch):
    if where == "take":

        def take(observer, *arguments):
            raise error("here")

        monkeypatch.setattr(measure._Observer, "_take", take)
    state, reads = narrow_weights("small"), []

    class State(dict):
        def __getitem__(self, key):
            reads.append(key)
            if where == "read" and reads.count(LAYER) == 2:
                raise error("here")
            return super().__getitem__(key)

    with pytest.raises(error, match="here"):
        measured("small", state=State(state))
    assert torch.is_grad_enabled()


def test_two_passes_see_every_noise_level_and_report(monkeypatch):
    steps, reports, run = [], [], Network.run

    def spy(network, levels, *rest):
        steps.append(levels.tolist())
        return run(network, levels, *rest)

    monkeypatch.setattr(Network, "run", spy)
    progress = Progress(lambda *report: reports.append(report))
    measured("small", Samples(passes=2, batch=2, side=8), progress=progress)
    assert steps == [[125.0, 625.0], [375.0, 875.0]]
    assert {phase for phase, _ in reports} == {PHASE}
    fractions = [fraction for _, fraction in reports]
    assert fractions == sorted(fractions)
    assert (fractions[0], fractions[-1]) == (0, 1)
    assert 0.9 < fractions[-2] <= 1
    assert max(after - before for before, after in pairwise(fractions)) < 0.1


# which files it can run


def runs(shapes, whole=None):
    """Tells whether a file can run, of the family of this file or of a whole one."""
    tensors = {key: TensorInfo(torch.float16, shape) for key, shape in (whole or shapes).items()}
    family = detect_family(Header(Path("a.safetensors"), tensors, {}, 0, 0))
    return can_run(layout_for(shapes, family), shapes)


def wide(kind):
    if kind == "sdxl_refiner":
        return refiner_layout(32, 64, 20, 4)
    channels = {"inpainting": 9, "pix2pix": 8, "depth": 5}.get(kind.partition("_")[2], 4)
    layout = {"sd1": one, "sd2": two, "sdxl": xl}[kind.partition("_")[0]]
    return layout(width=32, input_channels=channels)


RUN = [kind for kind in NARROW if kind.startswith("sd") and "edm" not in kind and kind[2] != "3"]


@pytest.mark.parametrize("kind", RUN)
def test_whole_files_of_unet_families_can_run(kind):
    assert runs(wide(kind))
    assert not runs(NARROW[kind]())  # of a width that norms do not divide
    assert not runs(few(wide(kind)))  # partial


@pytest.mark.parametrize("kind", [kind for kind in NARROW if kind not in RUN])
def test_other_families_cannot_run(kind):
    assert not runs(NARROW[kind]())


@pytest.mark.parametrize("kind", ["sdxl_edm", "sdxl_edm_v"])
def test_edm_cannot_run_at_any_width(kind):
    extra = {key: shape for key, shape in NARROW[kind]().items() if key.startswith("edm")}
    assert not runs({**xl(width=32), **extra})


BLOCK = "diffusion_model.input_blocks.4."


@pytest.mark.parametrize(
    "lost",
    [
        "diffusion_model.time_embed.2.weight",
        "diffusion_model.out.2.weight",
        "diffusion_model.middle_block.0.",
        BLOCK + "0.in_layers.2.weight",
        BLOCK + "0.emb_layers.1.weight",
        BLOCK + "1.proj_out.weight",
        BLOCK + "1.norm.weight",
        BLOCK + "1.transformer_blocks.0.norm3.weight",
        BLOCK + "1.transformer_blocks.0.attn2.to_out.0.weight",
        "text_model.embeddings.position_embedding.weight",
        "text_model.encoder.layers.5.",
        "text_model.encoder.layers.5.self_attn.q_proj.weight",
        "text_model.encoder.layers.11.mlp.fc2.weight",
        "text_model.final_layer_norm.weight",
    ],
)
def test_a_file_that_lacks_a_tensor_cannot_run(lost):
    shapes = wide("sd1")
    rest = without(shapes, lost)
    assert len(rest) < len(shapes)
    assert not runs(rest, shapes)


@pytest.mark.parametrize(
    "lost", ["embedders.0.", "embedders.1.", "resblocks.7.attn.in_proj_weight"]
)
def test_sdxl_needs_both_encoders_or_none(lost):
    shapes = wide("sdxl")
    assert not runs(without(shapes, lost), shapes)
    assert runs(without(shapes, "conditioner."), shapes)


@pytest.mark.parametrize(
    ("kind", "lost"),
    [
        ("sd1", "cond_stage_model."),
        ("sd1", "first_stage_model."),
        ("sd2", "cond_stage_model."),
        ("sd2", "resblocks.23."),
        ("sd2", "text_projection"),
        ("sdxl", "text_projection"),
    ],
)
def test_files_can_run_without_what_the_network_spares(kind, lost):
    shapes = wide(kind)
    rest = without(shapes, lost)
    assert len(rest) < len(shapes)
    assert runs(rest, shapes)


def test_the_cost_is_that_of_all_passes(monkeypatch):
    monkeypatch.setattr(measure, "_LAYER", 0.0)  # would be most of so small a network
    shapes = narrow_shapes("sd1")
    layout = layout_for(shapes, FAMILY["sd1"])
    cost = measuring_cost(layout)
    twice = measuring_cost(layout, Samples(2 * DEFAULT_SAMPLES.passes))
    assert twice == pytest.approx(2 * cost)
    assert measuring_cost(layout, Samples(side=32)) > 1.5 * cost
    assert_close(torch.tensor(cost), torch.tensor(measuring_cost(layout, DEFAULT_SAMPLES)))


def test_a_host_without_gradients_does_not_stop_the_run():
    expected = measured("sd1")
    with torch.inference_mode():
        assert measured("sd1") == expected
