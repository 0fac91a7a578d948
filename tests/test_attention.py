"""The two attentions against a reader's version of them: plain loops over frames and tokens."""

from functools import partial

import comfy.ldm.modules.attention
import pytest
import torch
from tune_a_video.tav_core.method.attention import (
    ATTENDS,
    SparseCausal,
    TemporalAttention,
    sdpa,
    sparse_causal,
    wide_heads,
)

HEADS, DIM = 2, 8


def naive(q, k, v):
    """Attention of `n c` queries on `m c` keys, one head and one query at a time."""
    out = torch.zeros_like(q)
    for head in range(HEADS):
        part = slice(head * DIM // HEADS, (head + 1) * DIM // HEADS)
        for i in range(len(q)):
            scores = torch.stack([q[i, part] @ key[part] for key in k]) / (DIM // HEADS) ** 0.5
            out[i, part] = torch.softmax(scores, 0) @ v[:, part]
    return out


@pytest.mark.parametrize("frames", [1, 2, 3, 5])
@pytest.mark.parametrize("videos", [1, 2])
def test_sparse_causal_attends_to_first_and_previous_frame(frames, videos):
    q, k, v = torch.randn(3, videos * frames, 4, DIM, dtype=torch.float64)
    keys, values = sparse_causal(k, frames), sparse_causal(v, frames)
    for video in range(videos):
        for frame in range(frames):
            own = video * frames + frame
            first, previous = video * frames, video * frames + max(frame - 1, 0)
            expected = naive(q[own], torch.cat([k[first], k[previous]]), torch.cat([v[first], v[previous]]))
            torch.testing.assert_close(naive(q[own], keys[own], values[own]), expected)


@pytest.mark.parametrize("frames", [1, 2, 3, 5])
@pytest.mark.parametrize("videos", [1, 2])
def test_keys_given_twice_are_left_out(frames, videos):
    q, k, v = torch.randn(3, videos * frames, 4, DIM, dtype=torch.float64)
    attention = SparseCausal(frames)
    keys, values = attention.keys(k), attention.values(v)
    scores = []

    def function(q, k, v, heads, **options):
        assert options == {"transformer_options": {}}
        scores.append(q.shape[0] * q.shape[1] * k.shape[1])
        return sdpa(q, k, v, heads)

    out = attention.attend(function, q, keys, values, HEADS, transformer_options={})
    torch.testing.assert_close(out, sdpa(q, keys, values, HEADS))
    assert sum(scores) == videos * 4 * 4 * (min(frames, 2) + 2 * max(frames - 2, 0))


FRAMES_OF = {
    "first_previous": lambda i, frames: [0, max(i - 1, 0)],
    "first_own_previous": lambda i, frames: sorted({0, i, max(i - 1, 0)}),  # each once
    "all": lambda i, frames: range(frames),
    "own": lambda i, frames: [i],
}


def read(q, k, v, frames, attends):
    """What attention gives for two videos, frame by frame."""
    out = []
    for video in range(2):
        for frame in range(frames):
            seen = [video * frames + other for other in FRAMES_OF[attends](frame, frames)]
            out.append(naive(q[video * frames + frame], torch.cat([*k[seen]]), torch.cat([*v[seen]])))
    return torch.stack(out)


@pytest.mark.parametrize("attends", ATTENDS)
@pytest.mark.parametrize("frames", [1, 2, 3, 5])
def test_each_frame_attends_to_the_frames_it_should(attends, frames):
    inputs = [t.requires_grad_() for t in torch.randn(3, 2 * frames, 4, DIM, dtype=torch.float64)]
    q, k, v = inputs
    attention = SparseCausal(frames, attends)
    out = attention.attend(sdpa, q, attention.keys(k), attention.values(v), HEADS)
    expected = read(q, k, v, frames, attends)
    torch.testing.assert_close(out, expected)
    gradients = [torch.autograd.grad(result.square().sum(), inputs) for result in (out, expected)]
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("attends", ATTENDS)
@pytest.mark.parametrize("frames", [1, 2, 3, 5])
def test_a_node_in_place_of_the_attention_sees_all_that_is_attended_to(attends, frames):
    q, k, v = torch.randn(3, 2 * frames, 4, DIM, dtype=torch.float64)
    attention = SparseCausal(frames, attends)
    replaced = attention.replaced(lambda q, k, v: sdpa(q, k, v, HEADS))
    out = replaced(q, attention.keys(k), attention.values(v))
    torch.testing.assert_close(out, read(q, k, v, frames, attends))


@pytest.mark.parametrize("attends", ATTENDS)
@pytest.mark.parametrize("frames", [2, 5])
def test_a_node_that_gives_back_the_values_gets_each_frames_own(attends, frames):
    """As perturbed attention guidance does."""
    q, k, v = torch.randn(3, 2 * frames, 4, DIM)
    attention = SparseCausal(frames, attends)
    replaced = attention.replaced(lambda _q, _k, v: v)
    assert torch.equal(replaced(q, attention.keys(k), attention.values(v)), v)


def test_the_papers_attention_is_these_two_calls_to_the_bit():
    """Frames 0 and 1 together on frame 0's keys; the others on those of the first and the previous frame."""
    q, k, v = torch.randn(3, 5, 4, DIM)
    attention = SparseCausal(5)
    early = sdpa(q[:2].flatten(0, 1)[None], k[:1], v[:1], HEADS)[0].unflatten(0, (2, 4))
    keys, values = (torch.cat([t[:1].expand_as(t[2:]), t[1:-1]], dim=1) for t in (k, v))
    out = attention.attend(sdpa, q, attention.keys(k), attention.values(v), HEADS)
    assert torch.equal(out, torch.cat([early, sdpa(q[2:], keys, values, HEADS)]))


@pytest.mark.parametrize("attends", ATTENDS)
@pytest.mark.parametrize("name", ["basic", "sub_quad", "split", "pytorch"])
def test_whichever_attention_the_host_chose_computes_the_same(attends, name):
    function = getattr(comfy.ldm.modules.attention, f"attention_{name}")
    q, k, v = torch.randn(3, 2 * 5, 4, DIM)
    attention = SparseCausal(5, attends)
    out = attention.attend(function, q, attention.keys(k), attention.values(v), HEADS)
    expected = read(*(t.double() for t in (q, k, v)), 5, attends)
    torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-5)


def test_all_frames_are_not_copied_for_each():
    attention = SparseCausal(5, "all")
    k = torch.randn(10, 4, DIM)
    assert attention.keys(k) is k and attention.values(k) is k


@pytest.mark.parametrize("attends", ["all", "first_own_previous"])
def test_a_node_that_computes_attention_by_itself_is_noticed_where_keys_are_put_together_later(attends):
    q, k, v = torch.randn(3, 5, 4, DIM)
    attention = SparseCausal(5, attends)
    sdpa(q, attention.keys(k), attention.values(v), HEADS)
    with pytest.raises(ValueError, match="another node computes self-attention by itself.*set attends to"):
        attention.keys(k)


def test_what_is_not_its_attention_is_left_alone():
    q, k, v = torch.randn(3, 5, 4, DIM)
    attention = SparseCausal(5)
    keys, values = attention.keys(k), attention.values(v)
    seen = []
    attention.attend(lambda *args, **options: seen.append((args, options)), q, keys.clone(), values, HEADS)
    attention.attend(lambda *args, **options: seen.append((args, options)), q, attention.keys(k), v, HEADS, mask=q)
    for args, _options in seen:
        assert args[0] is q
    assert [options for _args, options in seen] == [{}, {"mask": q}]


def test_temporal_attention_starts_as_an_exact_identity():
    layer = TemporalAttention(DIM, HEADS)
    layer.reset(torch.Generator().manual_seed(0))
    x = torch.randn(6, 4, DIM)
    assert torch.equal(layer(x, frames=3), x)


@pytest.mark.parametrize("frames", [1, 3])
def test_temporal_attention_is_over_frames_at_each_position(frames):
    layer = TemporalAttention(DIM, HEADS).double()
    x = torch.randn(2 * frames, 4, DIM, dtype=torch.float64)
    attention, norm = layer.attn_temp, layer.norm_temp
    expected = x.clone()
    for video in range(2):
        for token in range(4):
            h = norm(x[video * frames : (video + 1) * frames, token])
            out = naive(attention.to_q(h), attention.to_k(h), attention.to_v(h))
            expected[video * frames : (video + 1) * frames, token] += attention.to_out(out)
    torch.testing.assert_close(layer(x, frames), expected)


def test_reset_draws_from_its_own_generator_and_at_torchs_scale():
    state = torch.get_rng_state()
    layer = TemporalAttention(64, 4)
    torch.set_rng_state(state)
    layer.reset(torch.Generator().manual_seed(0))
    assert torch.equal(torch.get_rng_state(), state)
    bound = 64**-0.5
    for projection in (layer.attn_temp.to_q, layer.attn_temp.to_k, layer.attn_temp.to_v):
        assert 0.9 * bound < projection.weight.abs().max() <= bound


@pytest.mark.parametrize("width", [3, 4, 8, 16, 20])
def test_wider_heads_compute_the_same(width):
    def results(function):
        inputs = [torch.randn(2, n, HEADS * width, dtype=torch.float64, generator=random) for n in (4, 8, 8)]
        for tensor in inputs:
            tensor.requires_grad_()
        out = function(*inputs, HEADS)
        return out, *torch.autograd.grad(out.square().sum(), inputs)

    seen = []

    def attention(q, k, v, heads, **options):
        seen.append((q.shape[-1] // heads, options))
        return sdpa(q, k, v, heads)

    random = torch.Generator().manual_seed(0)
    expected = results(sdpa)
    random.manual_seed(0)
    torch.testing.assert_close(results(partial(wide_heads(attention), mask=None)), expected)
    assert seen == [(max(width, 16), {"mask": None})]

    seen.clear()
    with torch.no_grad():
        inputs = [torch.randn(2, n, HEADS * width, dtype=torch.float64, generator=random) for n in (4, 8, 8)]
        torch.testing.assert_close(wide_heads(attention)(*inputs, HEADS), sdpa(*inputs, HEADS))
    assert len(seen) == (2 if width < 16 else 1)  # one of the batch after the other
