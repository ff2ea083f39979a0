"""diffusers reads our files by code that is not ours: layout, names, alphas and sums are right."""

import logging
import warnings
from dataclasses import replace
from types import MappingProxyType

import pytest
import torch
from safetensors.torch import load_file
from tiny_family import added, layers_of, merge

from hyper_merge.synthetic.writer import NARROW, write_family

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # of the libraries, on being imported
    diffusers = pytest.importorskip("diffusers")
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("peft")
    from diffusers.loaders import single_file_utils

RANKS = (6, 3)
SEVERAL = "Already found a `peft_config` attribute"  # said of every second LoRA, whosoever
pytestmark = pytest.mark.filterwarnings(f"ignore:{SEVERAL}:UserWarning")

SMALL = replace(NARROW, count=2, width=16, context=24)


def unet_model(spec, **settings):
    """A UNet of the family's widths with random weights."""
    multiples = settings.pop("multiples", (1, 2, 4, 4))
    return diffusers.UNet2DConditionModel(
        sample_size=8,
        block_out_channels=tuple(factor * spec.width for factor in multiples),
        layers_per_block=2,
        attention_head_dim=8,
        norm_num_groups=16,
        **{"cross_attention_dim": spec.context, **settings},
    )


def text_model(spec, width, layers, kind=transformers.CLIPTextModel):
    """A text encoder with random weights."""
    config = transformers.CLIPTextConfig(
        vocab_size=spec.vocabulary,
        hidden_size=width,
        intermediate_size=4 * width,
        projection_dim=width,
        num_hidden_layers=layers,
        num_attention_heads=4,
        bos_token_id=spec.vocabulary - 2,
        eos_token_id=spec.vocabulary - 1,
    )
    return kind(config)


def named_for(model, weights):
    """Renames weights to the keys of this version of transformers."""
    weights.pop("text_model.embeddings.position_ids", None)
    if "text_model.final_layer_norm.weight" not in model.state_dict():
        # transformers 5 dropped the prefix
        weights = {key.removeprefix("text_model."): tensor for key, tensor in weights.items()}
    return weights


class SD1:
    """The family in diffusers, by component of its pipeline: model, weights, LoRA modules."""

    spec = SMALL
    layers = MappingProxyType({"unet": 278, "text_encoder": 72})
    pipeline = "StableDiffusionPipeline"
    rest = MappingProxyType(
        {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    )

    def models(self):
        return {"unet": unet_model(self.spec), "text_encoder": text_model(self.spec, 24, 12)}

    def weights(self, state, name, model):
        if name == "unet":
            config = {**model.config}
            return single_file_utils.convert_ldm_unet_checkpoint(dict(state), config)
        return named_for(model, self.text(dict(state), name, model))

    def text(self, state, name, model):
        return single_file_utils.convert_ldm_clip_checkpoint(state)

    def conditions(self):
        return {"encoder_hidden_states": torch.zeros(1, 77, 24)}


class SD2(SD1):
    spec = replace(SMALL, architecture="sd2")
    layers = MappingProxyType({"unet": 278, "text_encoder": 138})

    def models(self):
        unet = unet_model(self.spec, use_linear_projection=True)
        return {"unet": unet, "text_encoder": text_model(self.spec, 24, 23)}

    def text(self, state, name, model):
        return single_file_utils.convert_open_clip_checkpoint(model, state)


class SDXL(SD1):
    spec = replace(SMALL, architecture="sdxl", context=8, second_context=16)
    layers = MappingProxyType({"unet": 788, "text_encoder": 72, "text_encoder_2": 192})
    pipeline = "StableDiffusionXLPipeline"
    rest = MappingProxyType({"tokenizer_2": None})

    def models(self):
        unet = unet_model(
            self.spec,
            multiples=(1, 2, 4),
            cross_attention_dim=24,
            down_block_types=("DownBlock2D", *["CrossAttnDownBlock2D"] * 2),
            up_block_types=(*["CrossAttnUpBlock2D"] * 2, "UpBlock2D"),
            transformer_layers_per_block=[1, 2, 10],
            addition_embed_type="text_time",
            addition_time_embed_dim=256,
            projection_class_embeddings_input_dim=16 + 6 * 256,
            use_linear_projection=True,
        )
        second = text_model(self.spec, 16, 32, transformers.CLIPTextModelWithProjection)
        return {
            "unet": unet,
            "text_encoder": text_model(self.spec, 8, 12),
            "text_encoder_2": second,
        }

    def text(self, state, name, model):
        if name == "text_encoder":
            return single_file_utils.convert_ldm_clip_checkpoint(state)
        prefix = "conditioner.embedders.1.model."
        return single_file_utils.convert_open_clip_checkpoint(model, state, prefix=prefix)

    def conditions(self):
        added = {"text_embeds": torch.zeros(1, 16), "time_ids": torch.zeros(1, 6)}
        states = torch.zeros(1, 77, 24)
        return {"encoder_hidden_states": states, "added_cond_kwargs": added}


def load_strictly(model, weights):
    """Loads weights into the model: all of its own are among them, and no others."""
    model.load_state_dict(weights, strict=True)
    return model.eval()


# Each LoRA of a thousand modules takes peft seconds: where there are most, there is one.
CASES = [(SD1, "even", RANKS), (SD2, "adaptive", RANKS), (SDXL, "even", RANKS[:1])]


@pytest.fixture(scope="module", params=CASES, ids=lambda case: f"{case[0].__name__}-{case[1]}")
def judged(request, tmp_path_factory):
    """A merge of two whole narrow checkpoints, stored in float32."""
    kind, allocation, ranks = request.param
    family = kind()
    folder = tmp_path_factory.mktemp("judged")
    models = write_family(folder, family.spec)
    settings = {
        "ranks": ranks,
        "dtype": "float32",
        "method": "greedy",
        "iterations": 1,
        "allocation": allocation,
    }
    return family, models, merge(models, folder / "models", **settings)


@pytest.fixture
def pipeline(judged):
    """The hyper-model as a pipeline of diffusers."""
    family, _, merged = judged
    state = load_file(merged.place.hyper_model)
    parts = {
        name: load_strictly(model, family.weights(state, name, model))
        for name, model in family.models().items()
    }
    scheduler = diffusers.DDIMScheduler(steps_offset=1, clip_sample=False)
    kind = getattr(diffusers, family.pipeline)
    return kind(vae=None, tokenizer=None, scheduler=scheduler, **parts, **family.rest)


@pytest.fixture
def complaints():
    """Returns the libraries' log messages that are more than information."""
    lines = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: lines.append(record.getMessage())
    loggers = [logging.getLogger(name) for name in ("diffusers", "transformers", "peft")]
    for logger in loggers:
        logger.addHandler(handler)
    yield lines
    for logger in loggers:
        logger.removeHandler(handler)


def with_loras(pipe, merged, row, parts):
    """The pipeline with all LoRAs active by the multipliers of one checkpoint."""
    names = [f"block_{index}" for index in range(len(merged.loras))]
    for name, path in zip(names, merged.loras, strict=True):
        pipe.load_lora_weights(str(path), adapter_name=name)
    pairs = zip(row.multipliers, row.multipliers_of("text_encoder"), strict=True)
    scales = [{part: x if part == "unet" else text for part in parts} for x, text in pairs]
    pipe.set_adapters(names, scales)
    return names


def modules_of(merged, parts):
    """Returns the modules in each LoRA file, by the pipeline's component."""
    prefixes = {"unet": "lora_unet_", "text_encoder": "lora_te", "text_encoder_2": "lora_te2_"}
    if "text_encoder_2" in parts:
        prefixes["text_encoder"] = "lora_te1_"
    files = [{key.partition(".")[0] for key in load_file(path)} for path in merged.loras]
    return {
        part: [{name for name in names if name.startswith(prefixes[part])} for names in files]
        for part in parts
    }


def lora_layers(model):
    from peft.tuners.lora import LoraLayer

    return {name: module for name, module in model.named_modules() if isinstance(module, LoraLayer)}


def summed(models, merged, row):
    """Returns average + sum of multiplier times LoRA, in the checkpoint's own layout."""
    state = load_file(merged.place.hyper_model)
    loras = [load_file(path) for path in merged.loras]
    for layer in layers_of(models[0]):
        terms = zip(row.multipliers_of(layer.part), loras, strict=True)
        delta = sum(x * added(lora, layer.module) for x, lora in terms)
        rows = state[layer.key][slice(*layer.rows) if layer.rows else slice(None)]
        rows.copy_((rows.double().flatten(1) + delta).reshape(rows.shape).float())
    return state


def test_the_average_and_fused_loras_are_what_our_files_say(judged, pipeline, complaints, request):
    family, models, merged = judged
    require_checkpoint(family, models, merged, pipeline)
    allocation = "adaptive" if "adaptive" in request.node.name else "even"
    row = merged.report.checkpoints[1]
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        names = with_loras(pipeline, merged, row, family.layers)
    messages = [str(warning.message) for warning in warned]
    assert [message for message in messages if not message.startswith(SEVERAL)] == []
    assert complaints == []
    modules = modules_of(merged, family.layers)
    counts = {part: len(set().union(*files)) for part, files in modules.items()}
    if allocation == "even":
        assert counts == dict(family.layers)
    for part, files in modules.items():
        layers = lora_layers(getattr(pipeline, part))
        assert len(layers) == counts[part]
        for name, names_in_file in zip(names, files, strict=True):
            assert sum(name in layer.lora_A for layer in layers.values()) == len(names_in_file)
    pipeline.fuse_lora(components=list(family.layers), adapter_names=names)
    pipeline.unload_lora_weights()
    expected = summed(models, merged, row)
    before = load_file(merged.place.hyper_model)
    for part, count in counts.items():
        model = getattr(pipeline, part)
        fused = model.state_dict()
        expected_weights, average = (
            family.weights(state, part, model) for state in (expected, before)
        )
        assert fused.keys() == expected_weights.keys()
        for key, weight in expected_weights.items():
            torch.testing.assert_close(fused[key], weight, atol=1e-5, rtol=0, msg=key)
        changed = [key for key in expected_weights if not torch.equal(fused[key], average[key])]
        # With adaptive ranks an attention's module may hold zeros for the sake of the others.
        assert len(changed) == count or (allocation == "adaptive" and 0 < len(changed) < count)


def require_checkpoint(family, models, merged, pipeline):
    """Requires that the hyper-model is a whole checkpoint, and that its UNet computes numbers."""
    state, first = load_file(merged.place.hyper_model), load_file(models[0])
    assert {key: t.shape for key, t in state.items()} == {k: t.shape for k, t in first.items()}
    noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        out = pipeline.unet(noise, 7, **family.conditions()).sample
    assert out.shape == noise.shape
    assert bool(out.isfinite().all())


@pytest.mark.parametrize("judged", CASES[:1], indirect=True)
def test_multipliers_of_nought_leave_the_average(judged, pipeline):
    family, _, merged = judged
    noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    conditions = family.conditions()
    states = conditions["encoder_hidden_states"]
    states.normal_(generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        plain = pipeline.unet(noise, 7, **conditions).sample
        names = with_loras(pipeline, merged, merged.report.checkpoints[0], family.layers)
        changed = pipeline.unet(noise, 7, **conditions).sample
        pipeline.set_adapters(names, [0.0] * len(names))
        silent = pipeline.unet(noise, 7, **conditions).sample
    assert torch.equal(plain, silent)
    assert float((plain - changed).abs().max()) > 1e-4
