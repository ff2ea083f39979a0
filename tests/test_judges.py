"""diffusers reads our files by code that is not ours: layout, names, alphas and sums are right."""

import logging
import warnings
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file
from tiny_family import added, layers_of, merge

from hyper_merge.synthetic import NARROW, write_family

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # of the libraries, on being imported
    diffusers = pytest.importorskip("diffusers")
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("peft")
    from diffusers.loaders import single_file_utils

SPEC = replace(NARROW, count=2)
RANKS = (6, 3)
SEVERAL = "Already found a `peft_config` attribute"  # said of every second LoRA, whosoever
pytestmark = pytest.mark.filterwarnings(f"ignore:{SEVERAL}:UserWarning")


def unet_model():
    """A UNet of the family's widths with weights of its own."""
    widths = tuple(factor * SPEC.width for factor in (1, 2, 4, 4))
    return diffusers.UNet2DConditionModel(
        sample_size=8,
        block_out_channels=widths,
        layers_per_block=2,
        attention_head_dim=8,
        cross_attention_dim=SPEC.context,
    )


def text_model():
    """A text encoder of the family's widths with weights of its own."""
    config = transformers.CLIPTextConfig(
        vocab_size=SPEC.vocabulary,
        hidden_size=SPEC.context,
        intermediate_size=4 * SPEC.context,
        num_hidden_layers=12,
        num_attention_heads=6,
        bos_token_id=SPEC.vocabulary - 2,
        eos_token_id=SPEC.vocabulary - 1,
    )
    return transformers.CLIPTextModel(config)


def unet_weights(state):
    """A checkpoint's UNet under diffusers' names."""
    config = {**unet_model().config}
    return single_file_utils.convert_ldm_unet_checkpoint(dict(state), config)


def text_weights(state, model):
    """A checkpoint's text encoder under transformers' names."""
    found = single_file_utils.convert_ldm_clip_checkpoint(dict(state))
    found.pop("text_model.embeddings.position_ids", None)
    own = model.state_dict()
    if "text_model.final_layer_norm.weight" not in own:  # transformers 5 dropped the prefix
        found = {key.removeprefix("text_model."): tensor for key, tensor in found.items()}
    return found


def load_strictly(model, weights):
    """The model with these weights: every one of its own is among them, and none besides."""
    model.load_state_dict(weights, strict=True)
    return model.eval()


@pytest.fixture(scope="module")
def judged(tmp_path_factory):
    """A merge of two whole narrow checkpoints, stored in float32."""
    folder = tmp_path_factory.mktemp("judged")
    models = write_family(folder, SPEC)
    return models, merge(models, folder / "models", ranks=RANKS, dtype="float32", iterations=1)


@pytest.fixture
def pipeline(judged):
    """The hyper-model as a pipeline of diffusers."""
    state = load_file(judged[1].place.hyper_model)
    text = text_model()
    return diffusers.StableDiffusionPipeline(
        vae=None,
        text_encoder=load_strictly(text, text_weights(state, text)),
        tokenizer=None,
        unet=load_strictly(unet_model(), unet_weights(state)),
        scheduler=diffusers.DDIMScheduler(steps_offset=1, clip_sample=False),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


@pytest.fixture
def complaints():
    """What the libraries' loggers say that is more than information."""
    lines = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: lines.append(record.getMessage())
    loggers = [logging.getLogger(name) for name in ("diffusers", "transformers", "peft")]
    for logger in loggers:
        logger.addHandler(handler)
    yield lines
    for logger in loggers:
        logger.removeHandler(handler)


def with_loras(pipe, merged, row):
    """The pipeline with all LoRAs active by the multipliers of one checkpoint."""
    names = [f"block_{index}" for index in range(len(merged.loras))]
    for name, path in zip(names, merged.loras, strict=True):
        pipe.load_lora_weights(str(path), adapter_name=name)
    pipe.set_adapters(names, list(row.multipliers))
    return names


def lora_layers(model):
    from peft.tuners.lora import LoraLayer

    return {name: module for name, module in model.named_modules() if isinstance(module, LoraLayer)}


def summed(models, merged, row):
    """Average + sum of multiplier times LoRA, in the checkpoint's own layout."""
    state = load_file(merged.place.hyper_model)
    loras = [load_file(path) for path in merged.loras]
    for layer in layers_of(models[0]):
        terms = zip(row.multipliers, loras, strict=True)
        delta = sum(x * added(lora, layer.module) for x, lora in terms)
        state[layer.key] = (
            state[layer.key].double() + delta.reshape(state[layer.key].shape)
        ).float()
    return state


def test_the_hyper_model_is_a_checkpoint_to_diffusers(judged):
    models, merged = judged
    state, first = load_file(merged.place.hyper_model), load_file(models[0])
    assert {key: t.shape for key, t in state.items()} == {k: t.shape for k, t in first.items()}
    text = text_model()
    load_strictly(text, text_weights(state, text))
    model = load_strictly(unet_model(), unet_weights(state))
    noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        out = model(noise, 7, torch.zeros(1, 77, SPEC.context)).sample
    assert out.shape == noise.shape
    assert bool(out.isfinite().all())


@pytest.mark.parametrize("checkpoint", [0, 1])
def test_fused_loras_are_the_average_plus_multipliers_times_loras(
    judged, pipeline, complaints, checkpoint
):
    models, merged = judged
    row = merged.report.checkpoints[checkpoint]
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        names = with_loras(pipeline, merged, row)
    said = [str(warning.message) for warning in warned]
    assert [message for message in said if not message.startswith(SEVERAL)] == []
    assert complaints == []
    assert len(lora_layers(pipeline.unet)) == 278
    assert len(lora_layers(pipeline.text_encoder)) == 72
    for model in (pipeline.unet, pipeline.text_encoder):
        for layer in lora_layers(model).values():
            assert set(layer.lora_A) == set(names)
    pipeline.fuse_lora(adapter_names=names)
    pipeline.unload_lora_weights()
    expected = summed(models, merged, row)
    before = load_file(merged.place.hyper_model)
    text = pipeline.text_encoder
    for model, convert in (
        (pipeline.unet, unet_weights),
        (text, lambda state: text_weights(state, text)),
    ):
        found, wanted, average = model.state_dict(), convert(expected), convert(before)
        assert found.keys() == wanted.keys()
        for key, weight in wanted.items():
            torch.testing.assert_close(found[key], weight, atol=1e-5, rtol=0, msg=key)
        changed = [key for key in wanted if not torch.equal(found[key], average[key])]
        assert len(changed) == (278 if model is pipeline.unet else 72)


def test_multipliers_of_nought_leave_the_average(judged, pipeline):
    _, merged = judged
    noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    context = torch.randn(1, 77, SPEC.context, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        plain = pipeline.unet(noise, 7, context).sample
        names = with_loras(pipeline, merged, merged.report.checkpoints[0])
        changed = pipeline.unet(noise, 7, context).sample
        pipeline.set_adapters(names, [0.0] * len(names))
        silent = pipeline.unet(noise, 7, context).sample
    assert torch.equal(plain, silent)
    assert float((plain - changed).abs().max()) > 1e-4
