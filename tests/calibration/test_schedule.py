"""Steps against noise are those of diffusers' DDIM, and pictures stay of their size."""

import pytest
import torch
from reference_networks import FAMILY, InputLog, narrow_shapes, narrow_weights
from torch.testing import assert_close

from hyper_merge.calibration.network import Network
from hyper_merge.calibration.schedule import less_noisy, signal_share

NOW, THEN = 749, 499


def latents_of(size, *, predicts_v):
    """Returns noisy latents of a picture of that size, and what a network without error predicts."""
    generator = torch.Generator().manual_seed(2)
    picture, noise = (torch.randn(2, 4, 8, 8, generator=generator) for _ in range(2))
    picture = size * picture / picture.square().mean((1, 2, 3), keepdim=True).sqrt()
    share = signal_share(torch.tensor([NOW, NOW]))
    latents = share.sqrt() * picture + (1 - share).sqrt() * noise
    return latents, share.sqrt() * noise - (1 - share).sqrt() * picture if predicts_v else noise


def after_step(latents, output, predicts_v):
    steps = torch.full((2,), float(NOW)), torch.full((2,), float(THEN))
    return less_noisy(latents, output, *steps, predicts_v=predicts_v)


@pytest.mark.parametrize("predicts_v", [False, True])
def test_steps_are_those_of_diffusers(predicts_v):
    diffusers = pytest.importorskip("diffusers")
    scheduler = diffusers.DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        prediction_type="v_prediction" if predicts_v else "epsilon",
    )
    scheduler.set_timesteps(1000 // (NOW - THEN))
    latents, output = latents_of(0.8, predicts_v=predicts_v)
    output = output + 0.1 * latents.flip(0)
    expected = scheduler.step(output, NOW, latents).prev_sample
    assert_close(after_step(latents, output, predicts_v), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("predicts_v", [False, True])
@pytest.mark.parametrize(("size", "expected"), [(0.5, 0.5), (3.0, 1.0)])
def test_pictures_stay_of_their_size(size, expected, predicts_v):
    latents, output = latents_of(size, predicts_v=predicts_v)
    then = after_step(latents, output, predicts_v)
    # Two equations, of the picture and of the noise that both have in common.
    shares = (signal_share(torch.tensor([step, step])) for step in (NOW, THEN))
    (a, b), (c, d) = ((share.sqrt(), (1 - share).sqrt()) for share in shares)
    picture = (d * latents - b * then) / (a * d - b * c)
    assert float(picture.square().mean().sqrt()) == pytest.approx(expected, rel=1e-3)


def test_latents_are_drawn_for_the_prompts_of_a_run(monkeypatch):
    log = InputLog(monkeypatch)
    network = Network(narrow_weights("small").__getitem__, narrow_shapes("small"), FAMILY["small"])
    steps = torch.tensor([20.5, 999.0])
    drawn = network.draw(steps, 8, torch.Generator().manual_seed(4), 2)
    last, of_last, of_drawing, _ = log.unet
    with torch.no_grad():
        network.run(steps, 8, torch.Generator().manual_seed(4))
    noise, _, context, _ = log.unet
    assert of_last.tolist() == [509.75, 999.0]  # half way
    assert_close(of_drawing, context)
    assert_close(drawn[1], noise[1])  # of pure noise none is taken away
    assert not torch.allclose(last[0], noise[0], atol=0.1)
    with torch.no_grad():
        network.run(steps, 8, torch.Generator().manual_seed(4), drawn)
    assert_close(log.unet[0], drawn)
    assert_close(log.unet[2], context)
    assert not drawn.requires_grad


def test_what_is_read_beside_a_picture_stays_noise(monkeypatch):
    kind, log = "sd1_inpainting", InputLog(monkeypatch)
    network = Network(narrow_weights(kind).__getitem__, narrow_shapes(kind), FAMILY[kind])
    steps = torch.tensor([20.5, 500.0])
    drawn = network.draw(steps, 8, torch.Generator().manual_seed(4), 2)
    with torch.no_grad():
        network.run(steps, 8, torch.Generator().manual_seed(4))
    noise = log.unet[0]
    assert drawn.shape == noise.shape == (2, 9, 8, 8)
    assert torch.equal(drawn[:, 4:], noise[:, 4:])
    assert not torch.allclose(drawn[:, :4], noise[:, :4], atol=0.1)
