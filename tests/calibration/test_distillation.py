"""LoRAs are trained by the gradients of the outputs' differences, measured on other inputs, and never spoilt."""

import math
from collections import Counter
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
from pretended_gpu import GPU, pretended_gpu
from reference_networks import FAMILY, layout_for, narrow_shapes, narrow_weights
from tiny_family import Stop
from torch.testing import assert_close

from hyper_merge.calibration import distillation, text_encoders, unet
from hyper_merge.calibration.distillation import PHASE, distil
from hyper_merge.calibration.network import Network
from hyper_merge.calibration.student import Course, Student, TrainedLayer, is_beside
from hyper_merge.errors import InterruptedRun
from hyper_merge.runtime.progress import Progress

CPU = torch.device("cpu")
COURSE = Course(rounds=2, batch=2, side=8, drawing=2)
RANK = 2
END = "model.diffusion_model.out.2.bias"


def student_of(kind, seed=1):
    """Returns a student and what its two teachers are: the average with other factors of that rank."""
    shapes, average = narrow_shapes(kind), narrow_weights(kind)
    layout = layout_for(shapes, FAMILY[kind])
    generator = torch.Generator().manual_seed(seed)
    multipliers = torch.tensor([[1.0, -0.5], [0.3, 1.0]])
    layers, teachers = [], [{key: x.clone() for key, x in average.items()} for _ in range(2)]
    for layer in layout.layers:
        size = average[layer.key].std() / RANK
        up, down = (torch.randn(n, RANK, generator=generator) for n in (layer.m, layer.n))
        up, down = up * size, down.mT
        own = TrainedLayer(layer, up, down, multipliers, torch.float32)
        for m, state in enumerate(teachers):
            weight = state[layer.key][slice(*layer.rows)] if layer.rows else state[layer.key]
            weight += own.change(m, CPU).view(weight.shape)
        noisy = (x + 0.5 * x.std() * torch.randn(x.shape, generator=generator) for x in (up, down))
        layers.append(TrainedLayer(layer, *noisy, multipliers, torch.float32))
    return Student(average.__getitem__, shapes, layout, layers), teachers


@contextmanager
def opened(state):
    yield state.__getitem__


def lesson_of(
    student, teachers, course=COURSE, progress=None, weights=(1.0, 3.0), write=list, device=CPU
):
    """Returns the lesson, and the layers that it ended with."""
    taken = []

    def keep(layers):
        taken.extend(write(layers))
        return taken

    lesson = distil(
        student,
        [opened(state) for state in teachers],
        torch.tensor(weights, dtype=torch.float64),
        course,
        keep,
        device,
        progress or Progress(),
    )
    return lesson, taken


def output(student, state, number, course=COURSE):
    def inputs():
        generator = torch.Generator().manual_seed(course.seed + number)
        return course.samples.steps(number), course.side, generator

    average, network = (
        Network(read, student.shapes, student.layout.family)
        for read in (student.average, state.__getitem__)
    )
    return network.run(*inputs(), average.draw(*inputs(), course.drawing))


def with_blocks(student, layers, m):
    """Returns the whole weights of the student for a teacher's multipliers, put together again."""
    state = dict(student.average.__self__)
    for key in {layer.layer.key for layer in layers}:
        own = [layer for layer in layers if layer.layer.key == key]
        rows = [(x.up @ torch.diag(x.multipliers[m]) @ x.down).flatten(1) for x in own]
        state[key] = state[key] + torch.cat(rows).reshape(state[key].shape)
    return state


@pytest.mark.parametrize("kind", ["sd1", "sd2", "sdxl"])
def test_updates_are_those_of_whole_gradients_at_once(kind, monkeypatch):
    _, trained = lesson_of(*student_of(kind))
    student, teachers = student_of(kind)
    resolution = student.layout.family.resolution
    beside = [is_beside(x.layer, resolution, COURSE) for x in student.layers]
    kernels = {
        x.layer.kernel for x, is_beside in zip(student.layers, beside, strict=True) if is_beside
    }
    assert (None in kernels, (3, 3) in kernels, all(beside)) == (True, True, False)

    for module in (unet, text_encoders):  # all in one graph
        monkeypatch.setattr(module, "recomputed", lambda function, *rest: function(*rest))
    mine = [
        replace(x, up=x.up.clone().requires_grad_(), down=x.down.clone().requires_grad_())
        for x in student.layers
    ]
    factors = [factor for layer in mine for factor in (layer.up, layer.down)]
    # Of the two checkpoints a block serves one at least, and both alike at most.
    shares = [(x.multipliers**2).mean(0) / (x.multipliers**2).max(0)[0] for x in mine]
    assert all(0.5 <= float(share) <= 1 for of_layer in shares for share in of_layer)
    sizes = [
        float(factor.detach().square().mean().sqrt() * share.mean().sqrt())
        for layer, share in zip(mine, shares, strict=True)
        for factor in (layer.up, layer.down)
    ]
    first = [torch.zeros_like(factor) for factor in factors]
    second = [torch.zeros_like(factor) for factor in factors]
    order = torch.Generator().manual_seed(0)
    turns = [(n, m) for n in range(2) for m in torch.randperm(2, generator=order).tolist()]
    for place, (number, m) in enumerate(turns):
        rate = (place + 1) / 9 * (1 + math.cos(math.pi * place / 4)) / 2
        own = output(student, with_blocks(student, mine, m), number)
        loss = (own - output(student, teachers[m], number)).square().mean() * (1, 3)[m]
        gradients = torch.autograd.grad(loss, factors, materialize_grads=True)
        for index, gradient in enumerate(gradients):
            first[index] = 0.9 * first[index] + 0.1 * gradient
            second[index] = 0.98 * second[index] + 0.02 * gradient.square()
            step = first[index] / (1 - 0.9 ** (place + 1))
            step = step / (second[index] / (1 - 0.98 ** (place + 1))).sqrt()
            with torch.no_grad():
                factors[index] -= distillation._MOST * rate * sizes[index] * torch.nan_to_num(step)
    # Adam goes by signs, and a gradient of next to nothing has one of chance: where a group norm takes
    # away what a layer adds.
    sizes_of_gradients = torch.stack([moment.mean().sqrt() for moment in second])
    matters = (sizes_of_gradients > 1e-3 * sizes_of_gradients.median()).tolist()
    assert sum(matters) > 0.8 * len(matters)
    found = [factor for layer in trained for factor in (layer.up, layer.down)]
    for one, other, size, is_known in zip(found, factors, sizes, matters, strict=True):
        off = (one - other).abs() > 1e-3 * size
        assert not is_known or off.float().mean() < 0.02


def test_outputs_become_more_alike_on_inputs_that_no_round_saw():
    student, teachers = student_of("small")
    course = Course(rounds=12, batch=4, side=8, drawing=2)
    lesson, trained = lesson_of(student, teachers, course)
    assert lesson.is_better
    assert (lesson.after < 0.75 * lesson.before).all()
    for m, state in enumerate(teachers):  # the figures, once more
        own, alone = with_blocks(student, trained, m), student.average.__self__
        left = nothing = 0.0
        for number in (12, 13):
            with torch.no_grad():
                expected = output(student, state, number, course)
                left += (output(student, own, number, course) - expected).square().sum()
                nothing += (output(student, alone, number, course) - expected).square().sum()
        assert float(left / nothing) == pytest.approx(float(lesson.after[m]), rel=1e-3)


def test_steps_are_as_large_as_what_is_left(monkeypatch):
    """By the root of its share: half of the difference is a quarter of the square."""
    rates = []

    class Adam(torch.optim.Adam):
        def __init__(self, groups, **settings):
            rates.append(
                groups[0]["lr"] / float(groups[0]["params"][0].detach().square().mean().sqrt())
            )
            super().__init__(groups, **settings)

    monkeypatch.setattr(torch.optim, "Adam", Adam)
    student, teachers = student_of("small")
    monkeypatch.setattr(distillation, "_MOST", 1.0)
    lesson, _ = lesson_of(student, teachers)
    squares = student.layers[0].multipliers ** 2
    share = (squares / squares.max(0)[0]).mean()  # of the updates, see the test before
    left = float(lesson.before.mean() * share)
    assert rates[0] == pytest.approx(distillation._RATE * left**0.5)


def test_the_same_comes_out_again():
    first, second = (lesson_of(*student_of("small")) for _ in range(2))
    assert_close(first[0].after, second[0].after, rtol=1e-5, atol=0)
    untrained, _ = student_of("small")
    for one, other, before in zip(first[1], second[1], untrained.layers, strict=True):
        assert_close(one.up, other.up)
        assert not torch.equal(one.up, before.up)


@pytest.mark.parametrize("rate", [30.0, 1e30, torch.nan])
def test_a_training_that_spoils_the_outputs_is_told(monkeypatch, rate):
    for name in ("_RATE", "_MOST"):
        monkeypatch.setattr(distillation, name, rate)
    lesson, _ = lesson_of(*student_of("small"))
    assert not lesson.is_better


@pytest.mark.parametrize(
    ("first", "others", "is_better"),
    [
        (3.0, 0.5, True),
        (0.1, 1.1, True),
        (1e3, 0.7, False),
        (0.8, 1.1, False),
        (math.inf, 0.1, False),
    ],
)
def test_no_single_latent_decides_whether_a_training_has_gained(
    monkeypatch, first, others, is_better
):
    """Of the sum of squares the first one is nearly all."""
    before = torch.tensor([[1e5, 1e3, 2e3, 1e3]] * 2, dtype=torch.float64)
    factors = torch.tensor([first, others, others, others], dtype=torch.float64)
    found = iter((before, before * factors))
    monkeypatch.setattr(distillation._Runner, "differences", lambda *_: next(found))
    lesson, _ = lesson_of(*student_of("small"))
    assert lesson.is_better is is_better


def test_what_is_next_to_nothing_may_become_many_times_as_much():
    average, nothing = torch.tensor([[2.0, 4.0], [0.0, 0.0]]), torch.zeros(2, 2)
    change = distillation._mean_change(1e-9 * average, 1e-6 * average, average)
    assert 0 < float(change[0]) < 0.02
    assert float(distillation._mean_change(nothing, nothing + 1, average)[1]) == 0


def test_runs_see_the_factors_as_files_hold_them():
    course, (student, teachers) = Course(rounds=12, batch=2, side=8, drawing=2), student_of("small")
    in_8_bits = [replace(x, dtype=torch.float8_e4m3fn) for x in student.layers]
    rounded = [
        replace(
            x, up=x.up.to(x.dtype).float(), down=x.down.to(x.dtype).float(), dtype=torch.float32
        )
        for x in in_8_bits
    ]
    short, _ = lesson_of(replace(student, layers=rounded), teachers)
    lesson, trained = lesson_of(replace(student, layers=in_8_bits), teachers)
    assert_close(lesson.before, short.before)
    large = replace(trained[0], up=trained[0].up + 1e4)
    assert large.change(0, CPU).isfinite().all()
    coarse = [replace(x, dtype=torch.float8_e4m3fn) for x in student_of("small")[0].layers]
    lesson, _ = lesson_of(replace(student, layers=coarse), teachers, course)
    assert (lesson.after < 0.8 * lesson.before).all()


def test_what_counts_is_the_outputs_of_what_is_written():
    (student, teachers), (untrained, _) = student_of("small"), student_of("small")
    lesson, _ = lesson_of(student, teachers, write=lambda _: untrained.layers)
    assert_close(lesson.after, lesson.before)
    assert not lesson.is_better


def test_a_training_on_a_gpu_is_that_of_the_cpu():
    course = Course(rounds=1, batch=1, side=8, held_out=1, drawing=2)

    def lesson(device):
        student, teachers = student_of("small")
        layers = [replace(x, dtype=torch.float8_e4m3fn) for x in student.layers]
        student = replace(student, layers=layers)
        return lesson_of(student, teachers[:1], course, weights=(1.0,), device=device)

    expected, _ = lesson(CPU)
    with pretended_gpu() as gpu:
        found, _ = lesson(GPU)
    assert_close(found.after, expected.after, rtol=1e-3, atol=0)
    assert not torch.equal(found.after, found.before)
    assert set(gpu.waits) <= {"gpu", "cpu", "number"}  # weights go there; no solver


@pytest.mark.parametrize(("limit", "is_kept"), [(None, True), (2 * 10**9, False)])
def test_a_gpu_with_room_keeps_the_average(limit, is_kept):
    course = Course(rounds=1, batch=1, side=8, held_out=1, drawing=2)
    student, teachers = student_of("small")
    reads = Counter()

    def average(key):
        reads[key] += 1
        return student.average(key)

    with pretended_gpu(limit):
        counted = replace(student, average=average)
        lesson_of(counted, teachers[:1], course, weights=(1.0,), device=GPU)
    assert (max(reads.values()) == 1) == is_kept


def test_layers_without_rank_are_those_of_the_average():
    student, teachers = student_of("small")
    first, *others = student.layers
    none = first.up[:, :0], first.down[:0], first.multipliers[:, :0]
    empty = TrainedLayer(first.layer, *none, torch.float32)
    lesson, trained = lesson_of(replace(student, layers=[empty, *others]), teachers)
    assert lesson.after.isfinite().all()
    assert trained[0].up.shape == (first.layer.m, 0)


@pytest.mark.parametrize("value", [None, torch.nan])
def test_networks_that_say_nothing_are_told(value):
    student, _ = student_of("small")
    alike = dict(student.average.__self__)
    if value is not None:
        alike[END] = torch.full_like(alike[END], value)
    lesson, trained = lesson_of(student, [alike, alike])
    assert lesson is None
    assert not trained


def test_a_training_reports_how_far_it_is_and_stops():
    student, teachers = student_of("small")
    seen = []
    lesson_of(student, teachers, progress=Progress(lambda *report: seen.append(report)))
    phases, shares = zip(*seen, strict=True)
    assert set(phases) == {PHASE}
    assert shares[0] == 0
    assert shares[-1] == 1
    assert list(shares) == sorted(shares)
    assert shares[-2] == pytest.approx(1, abs=0.1)  # nothing was counted twice or left out
    stop = Stop(0.5, "stop")
    with pytest.raises(InterruptedRun):
        lesson_of(student, teachers, progress=Progress(stop.on_progress, stop.should_stop))
