"""Narrow networks of Stable Diffusion that can be trained on a CPU: denoiser, text encoders, schedule.

diffusers' UNet and transformers' CLIP text encoders, in the layouts of SD 1.x and of SDXL; see
`checkpoint_keys.py` for their files. Their "latents" are small RGBA pictures, so there is no VAE.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import ClassVar, NamedTuple

import torch
from checkpoint_keys import Place, clip_places, open_clip_places, unet_places
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from hyper_merge.checkpoints.io.header import Shape
from hyper_merge.synthetic.checkpoint_layouts import (
    FIRST_TEXT_PREFIX,
    SECOND_TEXT_PREFIX,
    TEXT_PREFIX,
    sd1_layout,
    sdxl_layout,
)

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # of the library, on being imported
    from diffusers import DDIMScheduler, UNet2DConditionModel

TOKENS = 77  # of a prompt, as of real models, which merges run with so many too
STEPS = 1000  # of the schedule
WIDTH = 32  # channels of the UNet's first level
_HEAD = 64  # channels of an attention's head, where there are as many
_SDXL_PIXELS = 1024.0  # of the pictures that SDXL is told it draws

State = Mapping[str, Tensor]  # of a checkpoint, by its own keys


class Conditions(NamedTuple):
    """What a denoiser reads of the prompts."""

    context: Tensor  # (b, tokens, width)
    added: dict[str, Tensor] | None = None  # beside it, by diffusers' names


class Words:
    """The tokens of prompts: a number for each word, and `count` of them in every prompt."""

    def __init__(self, prompts: Sequence[str], count: int = TOKENS) -> None:
        self._count = count
        words = sorted({word for prompt in prompts for word in _words(prompt)})
        self.begin, self.end = len(words), len(words) + 1  # the last two, as in CLIP
        self._numbers = {word: place for place, word in enumerate(words)}

    def __len__(self) -> int:
        return 2 + len(self._numbers)

    def tokens(self, prompts: Sequence[str]) -> Tensor:  # (prompts, count)
        """Returns the tokens of prompts; unknown words are left out."""
        rows = torch.full((len(prompts), self._count), self.end)
        for row, prompt in zip(rows, prompts, strict=True):
            known = [self._numbers[w] for w in _words(prompt) if w in self._numbers]
            row[0] = self.begin
            row[1 : 1 + len(known)] = torch.tensor(known[: self._count - 1], dtype=torch.long)
        return rows


class Network(nn.Module):
    """Predicts the noise in pictures from prompts.

    Heads and the tokens of begin and end are as in the real thing, so that what reads the
    checkpoints alone computes the same.
    """

    reads_corners: ClassVar[bool] = False

    def __init__(self, pixels: int, prompts: Sequence[str], tokens: int = TOKENS) -> None:
        super().__init__()
        self.pixels = pixels
        self.words = Words(prompts, tokens)
        self.schedule = DDIMScheduler(
            num_train_timesteps=STEPS,
            beta_start=0.00085,
            beta_end=0.012,
            beta_schedule="scaled_linear",
            clip_sample=False,
            set_alpha_to_one=False,
            steps_offset=1,
        )
        self.make_parts()
        self._shapes = self.shapes()
        self._places = self.places(self._shapes)
        self._check_places()

    def make_parts(self) -> None:
        """Makes the denoiser, `unet`, and the text encoders."""
        raise NotImplementedError

    def shapes(self) -> Mapping[str, Shape]:
        """Returns the shapes in a checkpoint, by its keys."""
        raise NotImplementedError

    def places(self, shapes: Mapping[str, Shape]) -> dict[str, Place]:
        """Returns the place in a checkpoint of every parameter, by its name in the network."""
        raise NotImplementedError

    def conditions(self, tokens: Tensor, corners: Tensor) -> Conditions:
        """Returns what the denoiser reads of the prompts; arguments as of `forward`."""
        raise NotImplementedError

    def forward(
        self,
        noisy: Tensor,  # (b, 4, size, size)
        steps: Tensor,  # (b,)
        tokens: Tensor,  # (b, tokens)
        corners: Tensor | None = None,  # (b, 2): where pictures were cut, from the top and left
    ) -> Tensor:  # (b, 4, size, size)
        """Returns the noise that is predicted."""
        if corners is None:
            corners = torch.zeros(len(tokens), 2, device=tokens.device)
        read = self.conditions(tokens, corners)
        return self.unet(noisy, steps, read.context, added_cond_kwargs=read.added).sample

    def noisy(self, pixels: Tensor, noise: Tensor, steps: Tensor) -> Tensor:
        """Returns pictures with noise of the given steps of the schedule."""
        return self.schedule.add_noise(pixels, noise, steps)

    @torch.no_grad()
    def draw(self, tokens: Tensor, steps: int, guidance: float, seed: int) -> Tensor:
        """Returns pictures (prompts, 4, size, size), from -1 to 1, by DDIM."""
        generator = torch.Generator().manual_seed(seed)
        shape = (len(tokens), 4, self.pixels, self.pixels)
        pixels = torch.randn(shape, generator=generator).to(tokens.device)
        empty = self.words.tokens([""]).to(tokens.device).expand_as(tokens)
        self.schedule.set_timesteps(steps)
        for step in self.schedule.timesteps:
            both = self(torch.cat([pixels, pixels]), step, torch.cat([empty, tokens]))
            without, with_prompt = both.chunk(2)
            noise = without + guidance * (with_prompt - without)
            pixels = self.schedule.step(noise, step, pixels).prev_sample
        return pixels.clamp(-1, 1)

    @torch.no_grad()
    def checkpoint(self) -> dict[str, Tensor]:
        """Returns all weights under the keys of a checkpoint."""
        keys = {place.key for place in self._places.values()}
        state = {key: torch.empty(self._shapes[key]) for key in self._shapes if key in keys}
        for name, parameter in self.named_parameters():
            place = self._places[name]
            place.of(state[place.key]).copy_(parameter)
        return state

    @torch.no_grad()
    def load(self, state: State) -> Network:
        """Takes the weights of a checkpoint, in float32."""
        for name, parameter in self.named_parameters():
            place = self._places[name]
            parameter.copy_(place.of(state[place.key]))
        return self

    def _check_places(self) -> None:
        parameters = dict(self.named_parameters())
        if missing := parameters.keys() ^ self._places.keys():
            raise SystemExit(f"expected a key for every parameter; not so: {sorted(missing)[:4]}")
        for name, parameter in parameters.items():
            key = self._places[name].key
            stored = self._places[name].of(torch.empty(self._shapes[key], device="meta"))
            if stored.shape != parameter.shape:
                raise SystemExit(
                    f"{key}: expected the shape {tuple(parameter.shape)} for {name},"
                    f" got {tuple(stored.shape)}"
                )


class SD1Network(Network):
    """The layout of SD 1.x: one text encoder."""

    _CONTEXT = 128
    _HEADS = 8  # of the UNet's attention

    def make_parts(self) -> None:
        """Makes the denoiser and the text encoder."""
        self.unet = UNet2DConditionModel(
            sample_size=self.pixels,
            block_out_channels=(WIDTH, 2 * WIDTH, 4 * WIDTH, 4 * WIDTH),
            cross_attention_dim=self._CONTEXT,
            attention_head_dim=self._HEADS,  # diffusers' name for their number
        )
        self.text = CLIPTextModel(_text_configuration(self.words, self._CONTEXT, 12))

    def shapes(self) -> Mapping[str, Shape]:
        """Returns the shapes in a checkpoint, by its keys."""
        return sd1_layout(WIDTH, self._CONTEXT, len(self.words))

    def places(self, shapes: Mapping[str, Shape]) -> dict[str, Place]:
        """Returns the place in a checkpoint of every parameter, by its name in the network."""
        return unet_places(self.unet, shapes) | clip_places("text", TEXT_PREFIX, shapes)

    def conditions(self, tokens: Tensor, corners: Tensor) -> Conditions:  # noqa: ARG002
        """Returns the output of the text encoder."""
        return Conditions(self.text(tokens).last_hidden_state)


class SDXLNetwork(Network):
    """The layout of SDXL: two text encoders, the text pooled, and six sizes."""

    reads_corners = True
    _CONTEXTS = (64, 128)
    _SIZE = 256  # entries by which a size is read

    def make_parts(self) -> None:
        """Makes the denoiser and the two text encoders."""
        widths = (WIDTH, 2 * WIDTH, 4 * WIDTH)
        first, second = self._CONTEXTS
        self.unet = UNet2DConditionModel(
            sample_size=self.pixels,
            block_out_channels=widths,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            transformer_layers_per_block=(1, 2, 10),
            cross_attention_dim=first + second,
            # diffusers' name for their number
            attention_head_dim=[max(width // _HEAD, 1) for width in widths],
            use_linear_projection=True,
            addition_embed_type="text_time",
            addition_time_embed_dim=self._SIZE,
            projection_class_embeddings_input_dim=second + 6 * self._SIZE,
        )
        self.first_text = CLIPTextModel(_text_configuration(self.words, first, 12))
        configuration = _text_configuration(self.words, second, 32)
        configuration.hidden_act = "gelu"  # the other: quick_gelu
        self.second_text = CLIPTextModelWithProjection(configuration)

    def shapes(self) -> Mapping[str, Shape]:
        """Returns the shapes in a checkpoint, by its keys."""
        return sdxl_layout(WIDTH, self._CONTEXTS, len(self.words))

    def places(self, shapes: Mapping[str, Shape]) -> dict[str, Place]:
        """Returns the place in a checkpoint of every parameter, by its name in the network."""
        return {
            **unet_places(self.unet, shapes),
            **clip_places("first_text", FIRST_TEXT_PREFIX, shapes),
            **open_clip_places("second_text", SECOND_TEXT_PREFIX, shapes),
        }

    def conditions(self, tokens: Tensor, corners: Tensor) -> Conditions:
        """Returns both encoders' last layer but one, the text pooled, and the sizes."""
        first = self.first_text(tokens, output_hidden_states=True)
        second = self.second_text(tokens, output_hidden_states=True)
        context = torch.cat([first.hidden_states[-2], second.hidden_states[-2]], -1)
        size = torch.full_like(corners, _SDXL_PIXELS)
        scale = _SDXL_PIXELS / self.pixels
        sizes = torch.cat([size, scale * corners, size], 1)
        return Conditions(context, {"text_embeds": second.text_embeds, "time_ids": sizes})


NETWORKS: Mapping[str, type[Network]] = {"sd1": SD1Network, "sdxl": SDXLNetwork}
"""The networks by the names of their layouts."""


def _text_configuration(words: Words, width: int, layers: int) -> CLIPTextConfig:
    return CLIPTextConfig(
        vocab_size=len(words),
        hidden_size=width,
        intermediate_size=4 * width,
        projection_dim=width,
        num_hidden_layers=layers,
        num_attention_heads=width // _HEAD,
        bos_token_id=words.begin,
        eos_token_id=words.end,
        pad_token_id=words.end,
    )


def _words(prompt: str) -> list[str]:
    return prompt.replace(",", " ").replace(":", " ").split()
