"""Magnitude, direction, ΔM and ΔD."""

import math

import pytest
import torch

from dora_lab.geometry import delta_direction, delta_magnitude, direction, magnitude


@pytest.fixture
def weight():
    return torch.randn(7, 5, generator=torch.Generator().manual_seed(0))  # (out, in), not square: the axes show


def test_magnitude_times_direction_is_the_weight(weight):
    torch.testing.assert_close(magnitude(weight)[:, None] * direction(weight), weight)


def test_one_magnitude_per_output_feature(weight):
    assert magnitude(weight).shape == (7,)
    torch.testing.assert_close(magnitude(torch.tensor([[3.0, 4.0], [0.0, 2.0], [1.0, 0.0]])), torch.tensor([5.0, 2, 1]))


def test_directions_have_norm_one(weight):
    torch.testing.assert_close(magnitude(direction(weight)), torch.ones(7))


def test_a_zero_row_has_magnitude_zero_and_no_direction(weight):
    weight[2] = 0
    assert magnitude(weight)[2] == 0
    assert torch.equal(direction(weight)[2], torch.zeros(5))
    assert torch.isfinite(direction(weight)).all()


@pytest.mark.parametrize(
    ("stored", "computed"),
    [(torch.float16, torch.float32), (torch.bfloat16, torch.float32), (torch.float64, torch.float64)],
)
def test_computed_in_float32_or_better(weight, stored, computed):
    assert magnitude(weight.to(stored)).dtype == direction(weight.to(stored)).dtype == computed


def test_a_large_float16_row_does_not_overflow():
    assert magnitude(torch.full((1, 4), 60_000.0, dtype=torch.float16)).item() == pytest.approx(120_000, rel=1e-3)


def test_unmoved_weight_has_no_delta(weight):
    assert delta_magnitude(weight, weight) == 0
    assert delta_direction(weight, weight) == 0


def test_rescaling_rows_moves_the_magnitude_alone(weight):
    assert delta_magnitude(1.5 * weight, weight) == pytest.approx(0.5 * magnitude(weight).mean().item())
    assert delta_direction(1.5 * weight, weight) == pytest.approx(0, abs=1e-12)


def test_turning_rows_moves_the_direction_alone():
    base = torch.tensor([[2.0, 0.0], [0.0, 5.0]])
    angle = 0.3
    turn = torch.tensor([[math.cos(angle), math.sin(angle)], [-math.sin(angle), math.cos(angle)]])
    assert delta_direction(base @ turn, base) == pytest.approx(1 - math.cos(angle), rel=1e-6)
    assert delta_magnitude(base @ turn, base) == pytest.approx(0, abs=1e-6)
    assert delta_direction(-base, base) == pytest.approx(2)


def test_delta_direction_is_one_minus_cosine(weight):
    other = torch.randn(7, 5, generator=torch.Generator().manual_seed(1))
    cosine = torch.nn.functional.cosine_similarity(other, weight, dim=1)  # (out,)
    assert delta_direction(other, weight) == pytest.approx((1 - cosine).mean().item(), rel=1e-6)


def test_a_small_angle_is_not_lost_to_rounding():
    base, turned = torch.tensor([[1.0, 0.0]]), torch.tensor([[1.0, 1e-5]])
    assert delta_direction(turned, base) == pytest.approx(0.5e-10, rel=1e-4)  # 1 - cos in float32 would give 0


def test_rows_of_zeros_count_as_unmoved(weight):
    base = weight.clone()
    base[0] = 0
    weight = 2 * weight
    assert delta_direction(weight, base) == pytest.approx(0, abs=1e-12)
    assert delta_direction(base, weight) == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("delta", [delta_magnitude, delta_direction])
def test_shapes_that_differ_are_refused(weight, delta):
    with pytest.raises(ValueError, match=r"\(7, 5\) and \(5, 7\) cannot be compared"):
        delta(weight, weight.T)
    with pytest.raises(ValueError, match="cannot be compared"):
        delta(weight[0], weight[0])
