"""Pictures of maps, attention and frequencies: numbers where they have one right answer."""

import math

import pytest
import torch
from torch import nn

from scalekd_ds import kernels
from scalekd_ds.inspection.pictures import (
    attention_maps,
    attention_pictures,
    default_queries,
    enlarge,
    heat_colours,
    mark_cell,
    pca_colours,
    spectrum,
    spectrum_pictures,
    tile,
    to_uint8,
    tokens_to_map,
    unnormalise,
    unsharded_copy,
)
from scalekd_ds.projector.cross_attention import CrossAttentionProjector


def test_colours_are_the_principal_components():
    """Two patterns of known strength in known directions: red is the strong one, green the weak one, blue is none."""
    h = torch.linspace(-1, 1, 6)[:, None].expand(6, 5)
    w = torch.linspace(-1, 1, 5)[None, :].expand(6, 5)
    directions = torch.linalg.qr(torch.randn(16, 2))[0]
    maps = 3.0 * h[None] * directions[:, :1, None] + 1.0 * w[None] * directions[:, 1:, None]
    red, green, blue = pca_colours(maps[None] + 7.0)[0]
    for colour, pattern in ((red, h), (green, w)):
        correlation = torch.corrcoef(torch.stack([colour.flatten(), pattern.flatten()]))[0, 1]
        assert abs(correlation) > 0.999
        assert colour.min() == 0.0 and colour.max() == 1.0
    assert torch.equal(blue, torch.full_like(blue, 0.5))


def test_colours_do_not_depend_on_scale_offset_or_the_order_of_images():
    maps = torch.randn(3, 12, 4, 4)
    colours = pca_colours(maps)
    assert colours.shape == (3, 3, 4, 4)
    torch.testing.assert_close(pca_colours(5.0 * maps - 2.0), colours, atol=1e-4, rtol=0)
    torch.testing.assert_close(pca_colours(maps.flip(0)).flip(0), colours, atol=1e-4, rtol=0)
    # the components belong to all images together: one image alone has others
    assert not torch.allclose(pca_colours(maps[:1]), colours[:1], atol=0.05)


@pytest.mark.parametrize("shape", [(1, 1, 3, 3), (1, 8, 1, 1), (2, 2, 1, 2)])
def test_colours_of_fewer_than_three_components_are_finite(shape):
    colours = pca_colours(torch.randn(shape))
    assert colours.shape == (shape[0], 3, *shape[2:]) and colours.isfinite().all()
    assert torch.equal(pca_colours(torch.ones(shape)), torch.full_like(colours, 0.5))


def test_tokens_become_maps_row_by_row():
    tokens = torch.arange(6.0)[None, :, None].expand(1, 6, 2)
    assert tokens_to_map(tokens, (2, 3))[0, 1].tolist() == [[0, 1, 2], [3, 4, 5]]


@pytest.mark.parametrize("norm", ["batch", "layer"])
@pytest.mark.parametrize("learned", [True, False])
def test_attention_maps_are_the_kernels_own_weights(monkeypatch, norm, learned):
    """The kernel is given one-hot values, four keys a time: what comes out are its weights, to be compared with ours."""
    projector = CrossAttentionProjector(6, 8, (3, 4), (4, 4), 2, softmax_scale=5.0, learned_query=learned, norm=norm)
    x, query = torch.randn(2, 6, 3, 4), None if learned else torch.randn(2, 16, 8)
    if norm == "batch":
        projector(x, query)
    copied = unsharded_copy(projector)
    projector.eval()
    seen = []

    def one_hot(q, k, v, scale):
        parts = [part[None, :, None].expand(2, -1, 2, -1).contiguous() for part in torch.eye(12).split(4, 1)]
        seen.append(torch.cat([kernels_attention(q, k, part, scale) for part in parts], -1))
        return kernels_attention(q, k, v, scale)

    kernels_attention = torch.no_grad()(kernels.cap_attention)
    monkeypatch.setattr(kernels, "cap_attention", one_hot)
    with torch.no_grad():
        out = projector(x, query)
        torch.testing.assert_close(copied(x, query), out)
    queries = [0, 5, 15]
    weights = attention_maps(copied, x, queries, query)
    assert weights.shape == (2, 3, 3, 4)
    torch.testing.assert_close(weights.flatten(2), seen[0].mean(2)[:, queries], atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(weights.sum((-2, -1)), torch.ones(2, 3))
    pictures = attention_pictures(torch.rand(2, 3, 16, 20), weights)
    assert pictures.shape == (2, 3, 3, 16, 20) and pictures.min() >= 0.0 and pictures.max() <= 1.0


def test_attention_refuses_what_it_cannot_show():
    projector = CrossAttentionProjector(6, 8, (4, 4), (4, 4), 2, learned_query=False)
    with pytest.raises(ValueError, match="query is missing"):
        attention_maps(projector, torch.randn(1, 6, 4, 4), [0])
    windows = CrossAttentionProjector(6, 8, (4, 4), (4, 4), 2, windows=(2, 2))
    with pytest.raises(ValueError, match="windows"):
        attention_maps(windows, torch.randn(1, 6, 4, 4), [0])


def test_queries_are_spread_over_the_grid():
    assert default_queries((4, 4)) == [0, 5, 10, 15]
    assert default_queries((7, 7), 3) == [8, 24, 40]
    assert default_queries((1, 1), 2) == [0, 0]


def test_a_waves_power_is_at_its_own_frequency():
    x = torch.arange(8, dtype=torch.float64)
    wave = torch.cos(math.pi * 3 * (2 * x + 1) / 16)
    power = spectrum((2.0 * wave[None, :] * torch.ones(6, 1, dtype=torch.float64)).expand(2, 4, 6, 8))
    assert power[0, 3].item() == pytest.approx(1.0, abs=1e-12)
    assert spectrum(torch.full((1, 2, 5, 5), 3.0))[0, 0].item() == pytest.approx(1.0, abs=1e-6)
    assert spectrum(torch.zeros(1, 2, 5, 5)).sum() == 0.0
    # Parseval: power is where the squares are
    noise = torch.randn(4, 32, 16, 16)
    flat = spectrum(noise) * 256
    assert flat.mean().item() == pytest.approx(1.0) and flat.std() < 0.2
    strong, weak = spectrum_pictures([torch.tensor([[1.0, 1e-9]]), torch.tensor([[1e-5, 1.0]])])
    assert torch.equal(strong[:, 0, 0], weak[:, 0, 1]) and torch.equal(strong[:, 0, 1], weak[:, 0, 0])
    assert strong[:, 0, 0].sum() > strong[:, 0, 1].sum()


def test_heat_gets_lighter_and_a_sheet_holds_its_pictures():
    ramp = heat_colours(torch.linspace(0, 1, 50)[None])
    lightness = (ramp * torch.tensor([0.3, 0.6, 0.1])[:, None, None]).sum(0)[0]
    assert ramp.shape == (3, 1, 50) and (lightness.diff() > 0).all()
    a, b, c = torch.rand(3, 3, 4, 5)
    page = tile([[a, b], [c]], gap=2)
    assert page.shape == (3, 10, 12)
    assert torch.equal(page[:, :4, 7:], b) and torch.equal(page[:, 6:, :5], c) and page[:, 6:, 5:].min() == 1.0
    with pytest.raises(ValueError, match="of one"):
        tile([[a, torch.rand(3, 4, 4)]])
    assert to_uint8(page).shape == (10, 12, 3) and to_uint8(page)[4, 0].tolist() == [255, 255, 255]
    framed = mark_cell(torch.zeros(3, 8, 12), 5, (2, 3))
    # the second row's last cell of 4x4 pixels
    assert framed.sum() == 3 * 12 and framed[:, 4:, 8:].sum() == 3 * 12 and framed[:, 5:7, 9:11].sum() == 0
    assert enlarge(a, (8, 10))[:, 1, 1].tolist() == a[:, 0, 0].tolist()


def test_images_come_back_from_their_normalisation():
    from timm.data.constants import IMAGENET_DEFAULT_MEAN as mean
    from timm.data.constants import IMAGENET_DEFAULT_STD as std

    images = torch.rand(2, 3, 4, 4)
    normalised = (images - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None]
    torch.testing.assert_close(unnormalise(normalised, mean, std), images)


def test_a_copy_of_a_projector_shares_nothing():
    projector = CrossAttentionProjector(6, 8, (4, 4), (4, 4), 2)
    asked = []

    def gathered(tensor):
        asked.append(tensor)
        return tensor.detach().clone()

    drawn = torch.get_rng_state()
    copied = unsharded_copy(projector, gathered)
    assert torch.equal(torch.get_rng_state(), drawn)
    assert len(asked) == len(projector.state_dict()) and isinstance(asked[0], nn.Parameter)
    with torch.no_grad():
        projector.q.weight.zero_()
    assert copied.q.weight.abs().sum() > 0 and not any(p.requires_grad for p in copied.parameters())
