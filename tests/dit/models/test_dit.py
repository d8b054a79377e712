"""The backbone: identities at initialisation, packing, conditioning rows, gradients, options."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from data_pipelines.packed import Conditioning, pack_conditioning
from dit.config import SpatioTemporalDiTConfig
from dit.models import SpatioTemporalDiT, build_backbone
from dit.models.embeddings import axis_sizes, rotate, rotation, sinusoids

CHANNELS, TEXT = 3, 5
MIXED = ((2, 3, 4), (1, 5, 2), (3, 2, 2))
UNIFORM = ((2, 3, 2),) * 3
VARIANTS = pytest.mark.parametrize(
    "options",
    [{}, {"modulation": "per_block"}, {"attention": "factorised"}, {"attention": "windowed", "window": (2, 2, 2)}, {"num_classes": 4}],
    ids=["wan", "per_block", "factorised", "windowed", "classes"],
)


def backbone(dtype=torch.float64, perturb=0.1, **options) -> SpatioTemporalDiT:
    sizes = {"hidden_size": 24, "depth": 2, "num_heads": 2, "ffn_size": 40, "patch_size": (1, 2, 1), "frequency_size": 16}
    torch.manual_seed(0)
    model = build_backbone(SpatioTemporalDiTConfig(**sizes | options), channels=CHANNELS, text_width=TEXT).to(dtype)
    for parameter in model.parameters():
        parameter.data.add_(perturb * torch.randn_like(parameter))
    return model


def pack(grids, dtype=torch.float64, labels=False, rows=None, texts=(3, 1, 4)):
    """Tokens, one time a sample, and conditioning."""
    g = torch.Generator().manual_seed(1)
    text = [torch.randn(n, TEXT, generator=g, dtype=dtype) for n in texts[: len(grids)]]
    cond = pack_conditioning(grids, text, torch.arange(len(grids)) if labels else None)
    x = torch.randn(sum(cond.lengths), 2 * CHANNELS, generator=g, dtype=dtype)
    t = torch.rand(len(grids), generator=g, dtype=dtype)
    return x, t, cond if rows is None else Conditioning(cond.grids, cond.text, cond.text_lengths, rows, cond.labels)


def close(a, b, atol=1e-12):
    torch.testing.assert_close(a, b, rtol=0, atol=atol)


@VARIANTS
@pytest.mark.parametrize("grids", [MIXED, UNIFORM], ids=["mixed", "uniform"])
def test_each_sample_of_a_pack_comes_out_as_if_alone(grids, options):
    model = backbone(**options)
    x, t, cond = pack(grids, labels=True)
    together = model(x, t, cond).split(cond.lengths)
    texts = cond.text.split(cond.text_lengths)
    for i, (part, out) in enumerate(zip(x.split(cond.lengths), together, strict=True)):
        assert cond.labels is not None
        alone = pack_conditioning([cond.grids[i]], [texts[i]], cond.labels[i : i + 1])
        close(model(part, t[i : i + 1], alone), out)


@VARIANTS
def test_a_new_block_is_the_identity_and_the_new_model_predicts_zero(options):
    model = backbone(perturb=0.0, **options)
    x, t, cond = pack(MIXED, labels=True)
    seen = []
    model.blocks[-1].register_forward_hook(lambda module, inputs, output: seen.append((inputs[0], output)))
    assert not model(x, t, cond).any()
    assert torch.equal(*seen[0])
    assert seen[0][0].std() > 0.1  # and not because the stream is empty


@pytest.mark.parametrize("grids", [MIXED, UNIFORM], ids=["mixed", "uniform"])
def test_features_are_the_tokens_behind_blocks_and_later_blocks_are_not_called(grids):
    model = backbone()
    x, t, cond = pack(grids)
    seen = []
    for block in model.blocks:
        block.register_forward_hook(lambda module, inputs, output: seen.append(output.reshape(len(x), -1)))
    model(x, t, cond)
    inside = seen.copy()
    seen.clear()
    last, first = model.features(x, t, cond, (1, 0))
    close(first, inside[0])
    close(last, inside[1])
    seen.clear()
    model.features(x, t, cond, (0,))
    assert len(seen) == 1 < len(inside)


@VARIANTS
@pytest.mark.parametrize("grids", [MIXED, UNIFORM], ids=["mixed", "uniform"])
def test_every_parameter_has_a_gradient(grids, options):
    model = backbone(**options)
    x, t, cond = pack(grids, labels=True)
    model(x, t, cond).square().sum().backward()
    dead = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    assert dead == []


def test_gradients_are_the_slope_of_the_loss():
    model = backbone()
    x, t, cond = pack(MIXED)
    x.requires_grad_()
    direction = torch.randn_like(x)
    (slope,) = torch.autograd.grad(model(x, t, cond).square().sum(), x)
    step = 1e-6
    finite = [model(x.detach() + sign * step * direction, t, cond).square().sum() for sign in (1, -1)]
    torch.testing.assert_close((slope * direction).sum(), (finite[0] - finite[1]) / (2 * step), rtol=1e-6, atol=0)


@VARIANTS
@pytest.mark.parametrize("grids", [MIXED, UNIFORM], ids=["mixed", "uniform"])
def test_equal_rows_are_one_row(grids, options):
    model = backbone(**options)
    x, t, cond = pack(grids, labels=True)
    doubled = 2 * cond.sample_of_token + torch.arange(len(x)) % 2  # two rows a sample, at the same time
    many = Conditioning(cond.grids, cond.text, cond.text_lengths, doubled, cond.labels)
    close(model(x, t.repeat_interleave(2), many), model(x, t, cond))


def test_a_row_modulates_its_own_tokens():
    """Without attention between tokens, a sample at two times is half of each sample at one time."""
    model = backbone()
    for block in model.blocks:
        block.self_attention.out.weight.data.zero_()
    x, _, cond = pack(((2, 3, 4),))
    rows = (torch.arange(24) % 3 == 0).long()
    both = Conditioning(cond.grids, cond.text, cond.text_lengths, rows)
    times = torch.tensor([0.2, 0.9], dtype=torch.float64)
    mixed, first, second = model(x, times, both), model(x, times[:1], cond), model(x, times[1:], cond)
    close(mixed, torch.where(rows[:, None] == 0, first, second))
    assert (first - second).abs().min() > 1e-6


def test_one_row_may_serve_samples_of_different_classes():
    model = backbone(num_classes=4)
    x, _, cond = pack(UNIFORM, labels=True)
    times = torch.full((3,), 0.4, dtype=torch.float64)
    shared = Conditioning(cond.grids, cond.text, cond.text_lengths, torch.zeros(len(x), dtype=torch.long), cond.labels)
    close(model(x, times[:1], shared), model(x, times, cond))


def test_no_label_is_the_last_class():
    model = backbone(num_classes=4)
    x, t, cond = pack(MIXED)
    null = Conditioning(cond.grids, cond.text, cond.text_lengths, None, torch.full((3,), 4))
    other = Conditioning(cond.grids, cond.text, cond.text_lengths, None, torch.tensor([4, 4, 0]))
    close(model(x, t, cond), model(x, t, null))
    changed = (model(x, t, other) - model(x, t, null)).abs().amax(1)
    assert not changed[:34].any()
    assert changed[34:].min() > 0


def test_samples_without_text_run_and_train():
    model = backbone()
    x, t, cond = pack(MIXED, texts=(0, 0, 0))
    model(x, t, cond).sum().backward()
    assert all(p.grad is not None for p in model.parameters())


@pytest.mark.parametrize("grids", [MIXED, UNIFORM], ids=["mixed", "uniform"])
def test_recomputing_activations_changes_nothing(grids):
    x, t, cond = pack(grids)
    results = []
    for mode in ("none", "selective", "full"):
        model = backbone(activation_checkpointing=mode)
        out = model(x, t, cond)
        out.square().sum().backward()
        results.append((out, [p.grad for p in model.parameters()]))
    close(results[0], results[1])
    close(results[0], results[2])


class Count(TorchDispatchMode):
    """Linear layers forward, and norms, that are computed."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.addmm.default:
            self.linear += 1
        elif func is torch.ops.aten.native_layer_norm.default:
            self.norms += 1
        return func(*args, **kwargs or {})


def test_selective_recomputing_repeats_norms_and_no_matrix_product():
    counts = []
    for mode in ("none", "selective", "full"):
        model = backbone(activation_checkpointing=mode)
        with Count() as count:
            count.linear = count.norms = 0
            model(*pack(MIXED)).sum().backward()
        counts.append((count.linear, count.norms))
    none, selective, full = counts
    assert selective[0] == none[0] < full[0]
    assert selective[1] == full[1] > none[1]


def test_bfloat16_weights_keep_time_and_norms_wide():
    wide, narrow = backbone(torch.float32), backbone(torch.bfloat16)
    narrow.load_state_dict({k: v.bfloat16() for k, v in wide.state_dict().items()}, strict=True)
    wide.load_state_dict({k: v.float() for k, v in narrow.state_dict().items()}, strict=True)
    x, t, cond = pack(MIXED, torch.float32)
    times = narrow.embed_time(t, cond)[0]
    assert times.dtype == torch.float32
    close(times, wide.embed_time(t, cond)[0], atol=0.0)
    a, b = narrow(x, t, cond), wide(x, t, cond)
    assert a.dtype == torch.float32
    assert (a - b).norm() < 0.02 * b.norm()  # matrix products round to 8 bits


def test_sinusoids_are_cosines_then_sines():
    t = torch.tensor([0.0, 1.0, 250.5], dtype=torch.float64)
    out = sinusoids(t, 6)
    for i in range(3):
        close(out[:, i], (t * 10_000 ** (-i / 3)).cos())
        close(out[:, 3 + i], (t * 10_000 ** (-i / 3)).sin())


def test_rotation_turns_pairs_and_sees_only_differences():
    assert axis_sizes(128) == (44, 42, 42)
    assert axis_sizes(12) == (4, 4, 4)
    positions = torch.tensor([[0, 0, 0], [5, 2, 7], [6, 4, 7], [1, 2, 0]])
    phases = rotation(positions, 12, torch.float64)
    x = torch.randn(4, 3, 12, dtype=torch.float64)
    close(rotate(x, phases)[0], x[0])
    h_axis = x[1, 0, 4:6]  # first pair of the second axis turns by its position, 2 radians
    turned = torch.stack([h_axis[0] * _cos(2) - h_axis[1] * _sin(2), h_axis[0] * _sin(2) + h_axis[1] * _cos(2)])
    close(rotate(x, phases)[1, 0, 4:6], turned)
    q, k = x[0].expand(4, 3, 12), x[1].expand(4, 3, 12)
    scores = (rotate(q, phases)[[2, 3]] * rotate(k, phases)[[1, 0]]).sum(-1)
    close(scores[0], scores[1])  # both pairs are (1, 2, 0) apart


def test_rotation_has_exact_derivatives():
    positions = torch.tensor([[1, 2, 3], [0, 5, 1]])
    phases = rotation(positions, 8, torch.float64)
    x = torch.randn(2, 2, 8, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: rotate(x, phases), x)
    assert torch.autograd.gradgradcheck(lambda x: rotate(x, phases), x)


def test_the_first_steps_of_training_lower_the_loss():
    model = backbone(torch.float32, perturb=0.0)
    x, t, cond = pack(MIXED, torch.float32)
    target = torch.roll(x, 1, 0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(60):
        loss = F.mse_loss(model(x, t, cond), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[0] == pytest.approx(target.square().mean().item(), rel=1e-6)
    assert losses[-1] < 0.3 * losses[0]


def _cos(angle):
    return torch.tensor(angle, dtype=torch.float64).cos()


def _sin(angle):
    return torch.tensor(angle, dtype=torch.float64).sin()


def test_a_network_of_jumps_starts_as_the_one_without_and_then_sees_them():
    x, t, cond = pack(MIXED)
    trained, with_jumps = backbone(), backbone(perturb=0.0, jumps=True)
    added = with_jumps.state_dict().keys() - trained.state_dict().keys()
    assert added == {f"jump_embedder.mlp.{layer}.{part}" for layer in (0, 2) for part in ("weight", "bias")}
    with_jumps.load_state_dict({**with_jumps.state_dict(), **trained.state_dict()})
    close(with_jumps(x, t, cond.over(t / 2)), trained(x, t, cond), atol=0)
    learned = backbone(jumps=True)
    close(learned(x, t, cond.over(torch.zeros_like(t))), learned(x, t, cond), atol=0)
    moved = learned(x, t, cond.over(torch.tensor([0.0, 0.3, 0.0], dtype=t.dtype))) - learned(x, t, cond)
    assert [bool((part.abs() > 1e-6).any()) for part in moved.split(cond.lengths)] == [False, True, False]


def test_both_conditions_of_a_pack_keep_their_jumps():
    x, t, cond = pack(MIXED, labels=True)
    jump = torch.tensor([0.1, 0.2, 0.3], dtype=t.dtype)
    model = backbone(jumps=True, num_classes=4)
    asked = cond.over(jump)
    both = model(torch.cat([x, x]), torch.cat([t, t]), asked.with_text([torch.zeros(1, TEXT).double()] * 3, cond.labels).beside(asked))
    close(both[len(x) :], model(x, t, asked))
    rows = cond.sample_of_token.flip(0)
    turned = Conditioning(cond.grids, cond.text, cond.text_lengths, rows, cond.labels, jump)
    assert bool(((model(x, t, turned) - model(x, t, replace(turned, jump=None))).abs() > 1e-6).any())
