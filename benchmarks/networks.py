"""A narrow Stable Diffusion 1.x that can be trained on a CPU: denoiser, text encoder, schedule.

diffusers' UNet and transformers' CLIP text encoder, saved under the keys of real SD 1.x checkpoints.
Its "latents" are small RGBA pictures, so there is no VAE.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel

from hyper_merge.synthetic.checkpoint_layouts import TEXT_PREFIX, UNET_PREFIX, sd1_layout

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # of the library, on being imported
    from diffusers import DDIMScheduler, UNet2DConditionModel
    from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint

TOKENS = 24  # of a prompt
HEADS = 2  # of the UNet's attention; the real ones have 8, of ten times as many channels
STEPS = 1000  # of the schedule
_BEGIN, _END, _FIRST_WORD = 0, 1, 2

State = Mapping[str, Tensor]  # of a checkpoint, by its own keys


@dataclass(frozen=True)
class Size:
    """Sizes of a narrow network."""

    pixels: int  # height and width of the pictures
    width: int = 32  # channels of the UNet's first level
    context: int = 128  # width of the text encoder


class Words:
    """The tokens of prompts: a number for each word."""

    def __init__(self, prompts: Sequence[str]) -> None:
        words = sorted({word for prompt in prompts for word in _words(prompt)})
        self._numbers = {word: _FIRST_WORD + place for place, word in enumerate(words)}

    def __len__(self) -> int:
        return _FIRST_WORD + len(self._numbers)

    def tokens(self, prompts: Sequence[str]) -> Tensor:  # (prompts, TOKENS)
        """Returns the tokens of prompts; unknown words are left out."""
        rows = torch.full((len(prompts), TOKENS), _END)
        for row, prompt in zip(rows, prompts, strict=True):
            known = [self._numbers[w] for w in _words(prompt) if w in self._numbers]
            row[0] = _BEGIN
            row[1 : 1 + len(known)] = torch.tensor(known[: TOKENS - 1], dtype=torch.long)
        return rows


class Network(nn.Module):
    """Predicts the noise in pictures from prompts."""

    def __init__(self, size: Size, vocabulary: int) -> None:
        super().__init__()
        self.size = size
        width = size.width
        self.unet = UNet2DConditionModel(
            sample_size=size.pixels,
            block_out_channels=(width, 2 * width, 4 * width, 4 * width),
            cross_attention_dim=size.context,
            attention_head_dim=HEADS,  # diffusers' name for their number
        )
        self.text = CLIPTextModel(
            CLIPTextConfig(
                vocab_size=vocabulary,
                hidden_size=size.context,
                intermediate_size=4 * size.context,
                num_hidden_layers=12,
                num_attention_heads=4,
                bos_token_id=_BEGIN,
                eos_token_id=_END,
                pad_token_id=_END,
            )
        )
        noise = DDIMScheduler(
            num_train_timesteps=STEPS,
            beta_start=0.00085,
            beta_end=0.012,
            beta_schedule="scaled_linear",
            clip_sample=False,
            set_alpha_to_one=False,
            steps_offset=1,
        )
        self.schedule = noise
        self._keys = _checkpoint_keys(self, vocabulary)

    def forward(
        self,
        noisy: Tensor,  # (b, 4, size, size)
        steps: Tensor,  # (b,)
        tokens: Tensor,  # (b, TOKENS)
    ) -> Tensor:  # (b, 4, size, size)
        """Returns the noise that is predicted."""
        return self.unet(noisy, steps, self.text(tokens).last_hidden_state).sample

    def noisy(self, pixels: Tensor, noise: Tensor, steps: Tensor) -> Tensor:
        """Returns pictures with noise of the given steps of the schedule."""
        return self.schedule.add_noise(pixels, noise, steps)

    @torch.no_grad()
    def draw(self, tokens: Tensor, steps: int, guidance: float, seed: int) -> Tensor:
        """Returns pictures (prompts, 4, size, size), from -1 to 1, by DDIM."""
        generator = torch.Generator().manual_seed(seed)
        shape = (len(tokens), 4, self.size.pixels, self.size.pixels)
        pixels = torch.randn(shape, generator=generator).to(tokens.device)
        empty = torch.full_like(tokens, _END)
        empty[:, 0] = _BEGIN
        self.schedule.set_timesteps(steps)
        for step in self.schedule.timesteps:
            both = self(torch.cat([pixels, pixels]), step, torch.cat([empty, tokens]))
            without, with_prompt = both.chunk(2)
            noise = without + guidance * (with_prompt - without)
            pixels = self.schedule.step(noise, step, pixels).prev_sample
        return pixels.clamp(-1, 1)

    def checkpoint(self) -> dict[str, Tensor]:
        """Returns all weights under the keys of an SD 1.x checkpoint."""
        parameters = dict(self.named_parameters())
        return {key: parameters[name].detach() for name, key in self._keys.items()}

    def load(self, state: State) -> Network:
        """Takes the weights of a checkpoint, in float32."""
        parameters = dict(self.named_parameters())
        with torch.no_grad():
            for name, key in self._keys.items():
                parameters[name].copy_(state[key])
        return self


def save_checkpoint(path: Path, state: State, dtype: torch.dtype = torch.float16) -> None:
    """Writes a checkpoint that hosts recognise as SD 1.x."""
    tensors = {key: tensor.to("cpu", dtype).contiguous() for key, tensor in state.items()}
    save_file(tensors, path)


def load_checkpoint(path: Path) -> dict[str, Tensor]:
    """Returns the tensors of a checkpoint by their keys, in float32."""
    return {key: tensor.float() for key, tensor in load_file(path).items()}


def _words(prompt: str) -> list[str]:
    return prompt.replace(",", " ").replace(":", " ").split()


def _checkpoint_keys(network: Network, vocabulary: int) -> dict[str, str]:
    """Returns the checkpoint's key of every parameter, by its name in the network."""
    size = network.size
    layout = sd1_layout(size.width, size.context, vocabulary)
    keys = {key: key for key in layout if key.startswith(UNET_PREFIX)}
    renamed = convert_ldm_unet_checkpoint(keys, dict(network.unet.config))
    names = {f"unet.{name}": key for name, key in renamed.items()}
    text = {f"text.text_model.{key.removeprefix(TEXT_PREFIX)}": key for key in layout}
    parameters = dict(network.named_parameters())
    names |= {name: key for name, key in text.items() if name in parameters}
    if missing := parameters.keys() ^ names.keys():
        raise SystemExit(f"expected a key for every parameter; those differ: {sorted(missing)[:4]}")
    for name, key in names.items():
        if tuple(parameters[name].shape) != tuple(layout[key]):
            raise SystemExit(
                f"{key}: expected the shape {layout[key]}, got {parameters[name].shape}"
            )
    return names
