"""UNets and text encoders give what diffusers and transformers give with the same weights."""

import pytest
import torch
from reference_networks import (
    CLIPS,
    FAMILY,
    OPEN_CLIPS,
    UNETS,
    VOCABULARY,
    InputLog,
    narrow_shapes,
    narrow_weights,
    run_diffusers_unet,
    transformers_clip,
    transformers_open_clip,
)
from torch.testing import assert_close

from hyper_merge.calibration import network as networks
from hyper_merge.calibration.network import Network
from hyper_merge.calibration.text_encoders import TextEncoder

KINDS = sorted(UNETS.keys() - {"small"})
ENDS = torch.tensor([4, 76])


@pytest.fixture(scope="module", params=KINDS)
def checkpoint(request):
    """A kind of checkpoint with shapes and weights."""
    shapes = narrow_shapes(request.param)
    return request.param, shapes, narrow_weights(request.param)


def tokens_with(ends):
    """Returns random tokens whose end is at these places, and after it."""
    generator = torch.Generator().manual_seed(5)
    tokens = torch.randint(VOCABULARY - 2, (len(ends), 77), generator=generator)
    tokens[:, 0] = VOCABULARY - 2
    return torch.where(torch.arange(77) >= ends[:, None], VOCABULARY - 1, tokens)


def run(kind, shapes, state, side=8):
    generator = torch.Generator().manual_seed(3)
    network = Network(state.__getitem__, shapes, FAMILY[kind])
    with torch.no_grad():
        return network.run(torch.tensor([20.5, 981.0]), side, generator)


def test_whole_networks_give_the_outputs_of_diffusers(checkpoint, monkeypatch):
    kind, shapes, state = checkpoint
    log = InputLog(monkeypatch)
    output = run(kind, shapes, state)
    latents, steps, context, _ = log.unet
    features, pooled = [], None
    for prefix, tokens, ends in log.texts:
        of_clip = prefix == CLIPS.get(kind)
        make = transformers_clip if of_clip else transformers_open_clip
        encoder = make(state, prefix)
        assert torch.equal((tokens == VOCABULARY - 1).long().argmax(1), ends)
        with torch.no_grad():
            result = encoder(tokens, output_hidden_states=True)
        if kind.startswith("sdxl"):
            features.append(result.hidden_states[-2])
            pooled = pooled if of_clip else result.text_embeds
        else:
            features.append(result.last_hidden_state)
    assert_close(torch.cat(features, -1), context, rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        expected = run_diffusers_unet(kind, state, latents, steps, torch.cat(features, -1), pooled)
    assert_close(output, expected, rtol=1e-4, atol=1e-5)
    assert 0.1 < float(output.std()) < 10


def test_clip_gives_the_outputs_of_transformers():
    shapes = narrow_shapes("sd1")
    state, prefix = narrow_weights("sd1"), CLIPS["sd1"]
    tokens = tokens_with(ENDS)
    with torch.no_grad():
        expected = transformers_clip(state, prefix)(tokens, output_hidden_states=True)
        whole, penultimate = (
            TextEncoder(state.__getitem__, shapes, prefix, *reading)(tokens, ENDS)
            for reading in ((0, True), (1, False))
        )
    assert_close(whole.hidden, expected.last_hidden_state, rtol=1e-4, atol=1e-5)
    assert_close(penultimate.hidden, expected.hidden_states[-2], rtol=1e-4, atol=1e-5)
    assert whole.pooled is None


def test_open_clip_pools_at_the_end_of_texts():
    shapes = narrow_shapes("sdxl")
    state, prefix = narrow_weights("sdxl"), OPEN_CLIPS["sdxl"]
    tokens = tokens_with(ENDS)
    with torch.no_grad():
        expected = transformers_open_clip(state, prefix)(tokens, output_hidden_states=True)
        encoded = TextEncoder(state.__getitem__, shapes, prefix, 1, False)(tokens, ENDS)
    assert_close(encoded.hidden, expected.hidden_states[-2], rtol=1e-4, atol=1e-5)
    assert_close(encoded.pooled, expected.text_embeds, rtol=1e-4, atol=1e-5)


def test_prompts_have_all_lengths_and_ordinary_tokens(monkeypatch):
    shapes = narrow_shapes("small")
    log = InputLog(monkeypatch)
    network = Network(narrow_weights("small").__getitem__, shapes, FAMILY["small"])
    with torch.no_grad():
        network.run(torch.arange(5.0), 8, torch.Generator().manual_seed(0))
    ((_, tokens, ends),) = log.texts
    assert ends.tolist() == [1, 19, 38, 57, 76]
    for row, end in zip(tokens, ends, strict=True):
        assert row[0] == VOCABULARY - 2
        assert bool((row[end:] == VOCABULARY - 1).all())
        assert bool((row[1:end] < VOCABULARY - 2).all())


@pytest.mark.parametrize("lost", ["resblocks.23.", "both"])
def test_sd2_runs_alike_without_what_is_idle(lost):
    shapes = narrow_shapes("sd2")
    state = narrow_weights("sd2")
    idle = ("resblocks.23.", "text_projection") if lost == "both" else (lost,)
    rest = {key: shape for key, shape in shapes.items() if not any(word in key for word in idle)}
    assert len(rest) < len(shapes)
    assert torch.equal(run("sd2", rest, state), run("sd2", shapes, state))


def test_sd2_reads_no_placeholder_of_the_idle_layer():
    shapes = narrow_shapes("sd2")
    state = narrow_weights("sd2")
    strange = {key: (1,) if "resblocks.23." in key else shape for key, shape in shapes.items()}
    assert torch.equal(run("sd2", strange, state), run("sd2", shapes, state))


@pytest.mark.parametrize("kind", ["sd1", "sdxl"])
def test_denoiser_alone_reads_random_features(kind, monkeypatch):
    shapes = narrow_shapes(kind)
    alone = {key: shape for key, shape in shapes.items() if "diffusion_model" in key}
    log = InputLog(monkeypatch)
    assert bool(run(kind, alone, narrow_weights(kind)).isfinite().all())
    _, _, context, vector = log.unet
    assert context.shape == (2, 77, UNETS[kind].context)
    assert float(context.std()) == pytest.approx(1, abs=0.05)
    assert (vector is None) == (kind == "sd1")


def test_sdxl_without_projection_reads_a_random_vector(monkeypatch):
    shapes = narrow_shapes("sdxl")
    rest = {key: shape for key, shape in shapes.items() if "text_projection" not in key}
    log = InputLog(monkeypatch)
    assert bool(run("sdxl", rest, narrow_weights("sdxl")).isfinite().all())
    vector = log.unet[3]
    assert vector.shape == (2, UNETS["sdxl"].labels)
    assert float(vector.std()) == pytest.approx(1, abs=0.1)


def test_matrices_stored_as_convolutions_run_alike():
    shapes = narrow_shapes("sdxl")
    state = narrow_weights("sdxl")
    turned = {
        key: value[..., None, None]
        if key.endswith(("proj_in.weight", "proj_out.weight"))
        else value
        for key, value in state.items()
    }
    assert torch.equal(run("sdxl", shapes, turned), run("sdxl", shapes, state))


@pytest.mark.parametrize(("channels", "heads"), [(32, 1), (320, 5), (1280, 20), (224, 2)])
def test_heads_of_later_families_divide_the_channels(channels, heads):
    assert networks._heads(channels) == heads
