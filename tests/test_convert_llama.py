"""Hedgehog in a Llama of transformers: tiny random models against oracles, and the whole experiment at toy size."""

import copy
import csv
import inspect
import json
import math
import shutil
import subprocess
import sys
from dataclasses import fields, replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

for package in ("transformers", "peft", "rouge_score"):
    pytest.importorskip(package, reason="pip install -r requirements-experiments.txt")

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "experiments")]

import convert_llama
import peft
import transformers
from convert_gpt2 import maps_of
from convert_llama import LlamaConfig
from data import samsum
from experiments import hedgehog_llama
from experiments.hedgehog_llama import swap, swap_back
from hedgehog import attention_weights
from train_gpt import parse_config

CPU = torch.device("cpu")
EOS = 2


each_kind = pytest.mark.parametrize("kind, window", [("hedgehog", 0), ("hedgehog_exp", 3), ("t2r", 1), ("window", 3)])


def tiny(kv_heads=2, kind="hedgehog", window=0, dtype=torch.float64, implementation="sdpa", **changes):
    """A random Llama of two layers; its maps and gates, if `kind`, are random too."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**dict(
        vocab_size=60, hidden_size=32, intermediate_size=40, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=kv_heads, max_position_embeddings=256, initializer_range=0.3, bos_token_id=1,
        eos_token_id=EOS, pad_token_id=0, attn_implementation=implementation) | changes)
    model = transformers.LlamaForCausalLM(config).to(dtype).eval()
    if kind:
        randomize(swap(model, kind, window))
    return model


def randomize(model):
    torch.manual_seed(1)
    for p in maps_of(model).values():
        torch.nn.init.normal_(p, std=0.5)


def some_ids(B=2, T=9):
    return torch.randint(3, 60, (B, T), generator=torch.Generator().manual_seed(2))


@torch.no_grad()
def logits(model, ids, **options):
    return model(input_ids=ids, use_cache=False, **options).logits


# ---------------------------------------------------------------- attention


@each_kind
def test_attention_is_the_sum_over_rotated_features(kind, window):
    model = tiny(kind=kind, window=window)
    attention, seen = model.model.layers[1].self_attn, []
    attention.register_forward_hook(lambda module, args, kwargs, y: seen.extend((kwargs["hidden_states"], y[0])),
                                    with_kwargs=True)
    logits(model, some_ids(1))
    x, y = seen[0][0], seen[1][0]                                           # (T, C)

    def head(projection, h, t, rotate=True):
        z = (projection.weight @ x[t]).view(-1, 8)[h]
        if rotate:  # pairs (i, i + 4) turn by t / 10000^(i / 4)
            angle = t * 10000.0 ** (-torch.arange(4, dtype=x.dtype) / 4)
            z = torch.cat((z[:4] * angle.cos() - z[4:] * angle.sin(), z[4:] * angle.cos() + z[:4] * angle.sin()))
        return z

    def phi(map, h, z):
        u = z @ map.weight[h]
        return dict(hedgehog=lambda: torch.cat((u.softmax(-1), (-u).softmax(-1))), t2r=lambda: (u + map.bias[h]).relu(),
                    hedgehog_exp=lambda: torch.cat((u, -u)).exp())[kind]()

    def weight(h, t, s):
        q, k, maps = head(attention.q_proj, h, t), head(attention.k_proj, h // 2, s), attention.hybrid or attention
        if t - s < window:
            return (q @ k / math.sqrt(8)).exp()
        gate = (q @ maps.map_gate[h] + maps.map_gate_bias[h]).exp() if window else 1
        return 0 if kind == "window" else gate * (phi(maps.map_q, h, q) @ phi(maps.map_k, h // 2, k))

    for t in (0, 4, 8):
        heads = []
        for h in range(4):  # query heads 0 and 1 read key-value head 0, 2 and 3 read head 1
            a = [weight(h, t, s) for s in range(t + 1)]
            v = [head(attention.v_proj, h // 2, s, rotate=False) for s in range(t + 1)]
            heads.append(sum(w * value for w, value in zip(a, v)) / sum(a))
        torch.testing.assert_close(attention.o_proj.weight @ torch.cat(heads), y[t], rtol=1e-6, atol=1e-6)


def test_a_window_that_holds_the_text_is_softmax_and_the_window_alone_a_band_of_it():
    softmax, ids = tiny(kind=None), some_ids(2, 6)
    for kind in ("hedgehog", "window"):
        torch.testing.assert_close(logits(tiny(kind=kind, window=6), ids), logits(softmax, ids))
    band = logits(softmax, ids, attention_mask=masks()["window"])
    torch.testing.assert_close(logits(tiny(kind="window", window=3), ids), band)
    assert (band - logits(tiny(window=3), ids)).abs().max() > 0.1


@pytest.mark.parametrize("kind, window", [("hedgehog", 0), ("t2r", 0), ("elu", 0), ("hedgehog_exp", 3), ("window", 3)])
def test_grouped_queries_are_repeated_heads(kind, window):
    grouped, repeated = tiny(2, kind, window), tiny(4, kind, window)
    weights = grouped.state_dict()
    for name in list(weights):
        if name.endswith(("k_proj.weight", "v_proj.weight")):
            weights[name] = weights[name].view(2, 8, 32).repeat_interleave(2, dim=0).flatten(0, 1)
        if ".map_k" in name:
            weights[name] = weights[name].repeat_interleave(2, dim=0)
    repeated.load_state_dict(weights)
    ids = some_ids()
    torch.testing.assert_close(logits(grouped, ids), logits(repeated, ids), rtol=1e-9, atol=1e-9)
    # Decoding, too, where the state of a group is one and not two copies.
    cache = [transformers.DynamicCache(), transformers.DynamicCache()]
    for t in range(ids.shape[1]):
        a, b = (step(model, ids[:, t:t + 1], c) for model, c in zip((grouped, repeated), cache))
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)
    assert cache[0].layers[0].keys.shape[1] == 2 and cache[1].layers[0].keys.shape[1] == 4


@each_kind
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_counts_for_nothing_on_either_side(side, implementation, kind, window):
    model, ids = tiny(kind=kind, window=window, implementation=implementation), some_ids()
    mask = torch.ones_like(ids)
    real = slice(3, None) if side == "left" else slice(6)
    mask[0] = 0
    mask[0, real] = 1
    padded = logits(model, ids, attention_mask=mask)
    torch.testing.assert_close(padded[0, real], logits(model, ids[:1, real])[0], rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(padded[1], logits(model, ids[1:])[0], rtol=1e-9, atol=1e-9)
    assert padded.isfinite().all()
    with torch.no_grad():  # and arguments may come without their names
        assert torch.equal(model.lm_head(model.model(ids, mask, None, None)[0]), padded)


@each_kind
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_in_a_mask_of_every_query_is_that_of_the_tokenizer(side, kind, window):
    model, ids, cache = tiny(kind=kind, window=window), some_ids(), transformers.DynamicCache()
    mask, causal = torch.ones_like(ids), torch.ones(9, 9, dtype=torch.bool).tril()
    mask[0, :3] = 0
    mask = mask if side == "left" else mask.flip(1)
    expected, shown = logits(model, ids, attention_mask=mask), causal & mask[:, None, None].bool()   # (B, 1, T, S)
    for whole in (shown, torch.zeros(shown.shape, dtype=torch.float64).masked_fill(~shown, -math.inf)):
        torch.testing.assert_close(logits(model, ids, attention_mask=whole), expected, rtol=1e-9, atol=1e-9)
    parts = [step(model, ids[:, t:u], cache, shown[:, :, t:u, :u]) for t, u in ((0, 5), (5, 6), (6, 9))]
    torch.testing.assert_close(torch.cat(parts, 1)[mask.bool()], expected[mask.bool()], rtol=1e-9, atol=1e-9)


@each_kind
def test_padding_has_no_gradient(kind, window):
    model = tiny(kind=kind, window=window)
    x = model.model.embed_tokens(some_ids()).detach().requires_grad_()
    mask = torch.tensor([[0] * 3 + [1] * 6, [1] * 9])
    model(inputs_embeds=x, attention_mask=mask, use_cache=False).logits[0, 3:].square().sum().backward()
    assert (x.grad[0, :3] == 0).all() and (x.grad[0, 3:] != 0).any() and x.grad.isfinite().all()


@each_kind
def test_swapping_back_restores_the_logits_to_the_bit(kind, window):
    model, ids = tiny(kind=None, dtype=torch.float32), some_ids()
    mask = torch.tensor([[0] * 3 + [1] * 6, [1] * 9])
    before, names = logits(model, ids, attention_mask=mask), set(model.state_dict())
    swap(model, kind, window)
    randomize(model)
    after = logits(model, ids, attention_mask=mask)
    assert (before - after).abs().max() > 0.1
    assert set(model.state_dict()) - names == set(maps_of(model))                  # projections keep their names
    assert set(copy.deepcopy(model).state_dict()) == set(model.state_dict())
    swap(model, "t2r", 4 - window)  # takes the place of the first
    swap_back(copy.deepcopy(model))
    assert len(model.model._forward_pre_hooks) == 1  # the copy's is another
    assert swap_back(model) is model and set(model.state_dict()) == names
    assert torch.equal(logits(model, ids, attention_mask=mask), before)
    assert not model.model._forward_pre_hooks


# ---------------------------------------------------------------- decoding


@torch.no_grad()
def step(model, ids, cache, mask=None):
    names = inspect.signature(transformers.LlamaForCausalLM.forward).parameters
    name = "past_key_values" if "past_key_values" in names else "cache"     # by version of transformers
    return model(input_ids=ids, attention_mask=mask, use_cache=True, **{name: cache}).logits


@each_kind
def test_token_by_token_is_the_full_forward_and_the_state_does_not_grow(kind, window):
    model, ids = tiny(kind=kind, window=window), some_ids(2, 20)
    full, cache = logits(model, ids), transformers.DynamicCache()
    sizes = set()
    for t in range(20):
        torch.testing.assert_close(step(model, ids[:, t:t + 1], cache)[:, 0], full[:, t], rtol=1e-9, atol=1e-9)
        states = [x for layer in cache.layers for x in (layer.keys, layer.values)]
        sizes |= {x.shape for x in states}
        assert cache.get_seq_length() == t + 1
        assert not window or all(x.untyped_storage().nbytes() == x.numel() * 8 for x in states)  # no view of more
    P = dict(t2r=8, window=0).get(kind, 16)
    assert sizes == {(2, 2, window + P, 9), (2, 2, window, 8) if window else (2, 2, P, 0)}  # (B, K, W+P, D+1), of keys


@each_kind
@pytest.mark.parametrize("pieces", [(12, 1, 1, 6), (1, 5, 1, 13), (7, 13)])
def test_a_prompt_may_come_in_pieces_and_padded_on_the_left(pieces, kind, window):
    model, ids = tiny(kind=kind, window=window), some_ids(2, 20)
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    full, cache, t, parts = logits(model, ids, attention_mask=mask), transformers.DynamicCache(), 0, []
    for n in pieces:
        parts.append(step(model, ids[:, t:t + n], cache, mask[:, :t + n]))
        t += n
    parts = torch.cat(parts, dim=1)
    torch.testing.assert_close(parts[0, 4:], full[0, 4:], rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(parts[1], full[1], rtol=1e-9, atol=1e-9)


@each_kind
@pytest.mark.parametrize("options", [{}, dict(num_beams=3), dict(num_beams=2, num_return_sequences=2)])
def test_generate_writes_with_the_state_what_it_writes_without_a_cache(options, kind, window):
    model, ids = tiny(kind=kind, window=window), some_ids(3, 12)
    mask = torch.ones_like(ids)
    mask[0, :5], mask[1, :2] = 0, 0
    settings = dict(input_ids=ids, attention_mask=mask, max_new_tokens=8, do_sample=False, eos_token_id=None, **options)
    cached = model.generate(**settings)
    assert torch.equal(cached, model.generate(**settings, use_cache=False))
    if not options:  # and each row is what it is alone
        alone = [model.generate(**settings | dict(input_ids=ids[i:i + 1, n:], attention_mask=None))[0, -8:]
                 for i, n in enumerate((5, 2, 0))]
        assert torch.equal(cached[:, -8:], torch.stack(alone))


def test_a_state_continues_no_keys_and_forgets_nothing():
    model, ids, cache = tiny(kind=None), some_ids(), transformers.DynamicCache()
    step(model, ids, cache)
    with pytest.raises(ValueError, match="cannot continue one that holds keys of softmax: start with an empty one"):
        step(swap(model), ids, cache)
    cache = transformers.DynamicCache()
    step(model, ids, cache)
    with pytest.raises(ValueError, match="cannot forget its last tokens"):
        cache.crop(-1)
    assert not cache.is_croppable
    with pytest.raises(ValueError, match="which softmax cannot continue"):
        step(swap_back(model), ids, cache)
    with pytest.raises(ValueError, match="cannot use one of StaticLayer: leave out cache_implementation, or pass an "
                                         r"empty DynamicCache\(\)"):
        swap(model).generate(input_ids=ids, max_new_tokens=2, cache_implementation="static")
    with pytest.raises(ValueError, match=r"no place in the SimpleNamespace of generate_batch\(\): call generate\(\)"):
        hedgehog_llama.state_layer(SimpleNamespace(), 0)                   # of keys in pages, not in layers


def test_weights_that_are_never_formed_are_not_given_out():
    model, ids = tiny(implementation="eager"), some_ids()
    for options in (dict(output_attentions=True), {}):
        model.config.output_attentions = not options
        with pytest.raises(ValueError, match=r"leave out output_attentions, or swap_back\(model\)"):
            logits(model, ids, **options)
    logits(model, ids, output_attentions=False)
    assert len(swap_back(model)(input_ids=ids).attentions) == 2


@each_kind
def test_the_rows_of_a_cache_can_be_repeated_and_chosen(kind, window):
    model, ids, caches = tiny(kind=kind, window=window), some_ids(2, 9), [transformers.DynamicCache() for _ in range(2)]
    step(model, ids[:, :8], caches[0])
    step(model, ids[:, :8].repeat_interleave(3, dim=0)[[5, 0, 1]], caches[1])
    caches[0].batch_repeat_interleave(3)
    caches[0].batch_select_indices(torch.tensor([5, 0, 1]))
    a, b = (step(model, ids[[1, 0, 0], 8:], cache) for cache in caches)
    torch.testing.assert_close(a, b)
    caches[0].reset()
    assert torch.equal(step(model, ids, caches[0]), logits(model, ids)) and caches[0].get_seq_length() == 9


# ---------------------------------------------------------------- masks


def masks(T=6):
    causal = torch.ones(T, T, dtype=torch.bool).tril()
    window = causal & ~torch.ones(T, T, dtype=torch.bool).tril(-3)
    packed = causal.clone()
    packed[3:, :3] = False
    prefix = causal.clone()
    prefix[:2, :3] = True
    return {name: x.expand(2, 1, T, T) for name, x in dict(causal=causal, window=window, packed=packed,
                                                           prefix=prefix).items()}


REFUSED = ('cannot honour {}.*: load the model with attn_implementation "sdpa" or "eager" and give it nothing but a '
           r"\(B, S\) mask of padding, or swap_back\(model\)").format


@pytest.mark.parametrize("name, called", [("window", "a sliding window"), ("prefix", "a mask that shows a token later"),
                                          ("packed", "a mask that hides tokens from some later ones .packed seq")])
def test_a_mask_that_is_not_padding_is_refused(name, called):
    model, ids, mask = tiny(), some_ids(2, 6), masks()[name]
    additive = torch.zeros(mask.shape, dtype=torch.float64).masked_fill(~mask, torch.finfo(torch.float64).min)
    for given in (mask, additive):
        with pytest.raises(ValueError, match=REFUSED(called)):
            logits(model, ids, attention_mask=given)


def test_masks_that_can_be_honoured_are_and_others_are_refused():
    model, ids, causal = tiny(), some_ids(2, 6), masks()["causal"]
    for mask in (causal, -1e9 * (~causal).double(), causal.expand(2, 4, 6, 6)):
        torch.testing.assert_close(logits(model, ids, attention_mask=mask), logits(model, ids))
    alibi = torch.rand(2, 1, 6, 6, dtype=torch.float64) - 1e9 * (~causal).double()
    early_bias, padded = alibi.clone(), causal & (torch.arange(6) > 1)
    early_bias[..., -1, :] = 0
    heads = torch.cat((causal, padded), dim=1).repeat(1, 2, 1, 1)
    for mask, called in ((alibi, "a bias"), (early_bias, "a bias"), (heads, "a mask that differs from head to head")):
        with pytest.raises(ValueError, match=REFUSED(called)):
            logits(model, ids, attention_mask=mask)
    with pytest.raises(ValueError, match=REFUSED("a mask that hides .*packed")):
        logits(model, ids, position_ids=torch.tensor([[0, 1, 2, 0, 1, 2]]).expand(2, -1))
    visible, flash = hedgehog_llama.visible_keys, torch.tensor([[0, 1, 1, 1]])
    assert visible(flash, None, 2, 2).tolist() == [[True, True]] and visible(None, None, 4, 0) is None
    restart = torch.tensor([[0, 1, 0, 1]])  # packed: flash attention has no mask then
    for mask, positions, past, called in ((None, restart, 0, "position_ids"), (flash, None, 2, "a mask of 4 keys where "
                                           "there are 6"), (object(), None, 0, "the object of flex_attention")):
        with pytest.raises(ValueError, match=REFUSED(called)):
            visible(mask, positions, 4, past)


def test_another_architecture_head_width_or_map_is_refused():
    gpt2 = transformers.GPT2LMHeadModel(transformers.GPT2Config(n_layer=1, n_head=2, n_embd=8, vocab_size=9))
    with pytest.raises(ValueError, match="GPT2LMHeadModel is not of the Llama architecture; supported is"):
        swap(gpt2)
    with pytest.raises(ValueError, match="a LlamaModel has no head .*: pass the LlamaForCausalLM whose .model it is"):
        swap(tiny(kind=None).model)
    with pytest.raises(ValueError, match="'cosformer' is not a map of single heads and positions: choose one of"):
        swap(tiny(), "cosformer", 3)
    for kind, window in (("hedgehog", -1), ("window", 0)):
        with pytest.raises(ValueError, match=f"a hybrid needs a window of at least 1 token, got {window}"):
            swap(tiny(), kind, window)


@pytest.mark.parametrize("kind", [None, "elu"])
@pytest.mark.parametrize("change, told", [
    (lambda model: setattr(model.model.layers[1].self_attn, "head_dim", 4),
     "4 and 2 heads of 4 are not layer 1's 32 queries and 16 keys"),
    (lambda model: setattr(model.config, "num_attention_heads", 2), "2 and 2 heads of 8 are not layer 0's 32 queries"),
    (lambda model: setattr(model.config, "num_key_value_heads", 4), "4 and 4 heads of 8 are not layer 0's 32 queries"),
])
def test_a_head_width_that_does_not_match_is_refused_before_a_layer_is_changed(change, told, kind):
    model = tiny(kind=kind)
    change(model)
    before = [(type(layer.self_attn), list(layer.self_attn.state_dict())) for layer in model.model.layers]
    with pytest.raises(ValueError, match=f"a head width that does not match: {told}.*: load the model with the config"):
        swap(model)
    assert [(type(layer.self_attn), list(layer.self_attn.state_dict())) for layer in model.model.layers] == before
    assert len(model.model._forward_pre_hooks) == (kind is not None)


def test_a_peft_model_is_refused_with_what_to_do_and_that_works():
    lora = partial(peft.get_peft_model, peft_config=peft.LoraConfig(target_modules=["q_proj", "v_proj"]))
    first, ids = swap(tiny(kind=None)), some_ids()
    expected, after = logits(first, ids), lora(tiny(kind=None))
    for refused in (swap, swap_back):
        with pytest.raises(ValueError, match=r"before get_peft_model, or pass get_base_model\(\)"):
            refused(after)
    swap(after.get_base_model())
    for model in (after, lora(first)):
        torch.testing.assert_close(logits(model, ids), expected)


def test_a_model_whose_attention_accelerate_wraps_is_refused_and_may_be_wrapped_later():
    accelerate, ids = pytest.importorskip("accelerate"), some_ids()
    dispatch = partial(accelerate.dispatch_model, device_map={"": "cpu"}, force_hooks=True)
    for change in (swap, swap_back):
        with pytest.raises(ValueError, match=r"has a forward of its own, as accelerate gives it .* without device_map"):
            change(dispatch(tiny(kind=None if change is swap else "hedgehog")))
    assert torch.equal(logits(dispatch(tiny()), ids), logits(tiny(), ids))


@each_kind
def test_maps_and_states_are_float32_at_least(kind, window):
    for dtype, held in ((torch.bfloat16, torch.float32), (torch.float32, torch.float32), (torch.float64,) * 2):
        model, cache = tiny(kind=kind, window=window, dtype=dtype), transformers.DynamicCache()
        assert step(model, some_ids(), cache).dtype == dtype
        states = [x for layer in cache.layers for x in (layer.keys, layer.values)]
        assert {x.dtype for x in (*states, *maps_of(model).values())} == {held}


# ---------------------------------------------------------------- training


def examples():
    rows = some_ids(6, 14).tolist()
    return [dict(ids=row[:14 - i], n_prompt=6, cut=False) for i, row in enumerate(rows)]


CONFIG = LlamaConfig(batch_size=2, distill_epochs=4, lora_epochs=2, lora_lr=1e-2, rank=2, alpha=4)


def parameters(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}


@pytest.mark.parametrize("kind, window", [("hedgehog", 0), ("hedgehog", 1), ("hedgehog_exp", 3)])
def test_a_layer_is_compared_on_the_teachers_own_activations(kind, window):
    model, ids = tiny(kind=kind, window=window), some_ids(2, 9)
    mask = torch.tensor([[1] * 6 + [0] * 3, [1] * 9])
    losses = convert_llama.imitate(model, ids, mask)
    teacher = swap_back(tiny(implementation="eager"))
    hidden = teacher(input_ids=ids, attention_mask=mask, output_hidden_states=True, output_attentions=True)
    for i, layer in enumerate(tiny(kind=kind, window=window).model.layers):
        x = layer.input_layernorm(hidden.hidden_states[i])
        rotation = teacher.model.rotary_emb(x, torch.arange(9)[None])
        (q, k, _), maps = layer.self_attn.rotated(x, rotation), layer.self_attn.hybrid or layer.self_attn
        k, phi_k = (x.repeat_interleave(2, dim=1) for x in (k, maps.map_k(k)))
        a = attention_weights(maps.map_q(q, is_query=True), phi_k)
        if window:  # what it attends with: where the values are the identity's rows, the outputs are the weights
            values = torch.eye(9, dtype=x.dtype).expand(2, 2, 9, 9)
            a = maps.attend(q, k[:, ::2], values, "auto", None, False, 0, keys=mask.bool())
        p, rows = hidden.attentions[i], []                                  # (B, H, T, T)
        for b, n in enumerate(mask.sum(-1)):
            rows += [-(p[b, :, t, :t + 1] * a[b, :, t, :t + 1].log()).sum(-1) for t in range(n)]
        assert losses[i, 0].item() == pytest.approx(torch.stack(rows).mean().item(), abs=1e-6)
        assert losses[i, 0] >= losses[i, 1] > 0
    torch.testing.assert_close(logits(model, ids), logits(tiny(kind=kind, window=window), ids))  # linear again


@pytest.mark.parametrize("kind, window", [("hedgehog", 0), ("t2r", 0), ("hedgehog", 3), ("elu", 3)])
def test_distillation_moves_the_maps_alone_and_nearer_to_softmax(kind, window):
    model = tiny(kind=None, dtype=torch.float32)
    swap(model, kind, window)
    learned = {name.split(".")[-1] for name in maps_of(model)}
    assert ({"map_gate", "map_gate_bias"} <= learned) == (window > 0)
    before, kl = parameters(model), convert_llama.divergence(model, examples(), CONFIG, CPU)
    convert_llama.distill(model, examples(), CONFIG, CPU)
    after = parameters(model)
    assert {name for name in after if not torch.equal(before[name], after[name])} == set(maps_of(model))
    closer = convert_llama.divergence(model, examples(), CONFIG, CPU)
    assert all(0 <= b < a for a, b in zip(kl, closer))


def test_distillation_compiled_is_the_same_for_batches_of_every_length(monkeypatch):
    """Through a stand-in for the compiler, which takes a minute: what is compiled, how, and that it is what runs."""
    lengths = set()

    def compiler(function, dynamic):
        assert function is convert_llama.imitation_loss and dynamic
        return lambda q, *args, **kwargs: (lengths.add(q.shape[2]), function(q, *args, **kwargs))[1]

    monkeypatch.setattr(torch, "compile", compiler)
    models = [swap(tiny(kind=None, dtype=torch.float32), "hedgehog") for _ in range(2)]
    for model, compiled in zip(models, (False, True)):
        convert_llama.distill(model, examples(), replace(CONFIG, compile=compiled), CPU)
        assert (len(lengths) > 1) == compiled
    assert all(torch.equal(p, parameters(models[1])[name]) for name, p in parameters(models[0]).items())


def test_the_divergence_is_the_mean_over_queries_whatever_the_batch():
    model = tiny()
    one, all = (convert_llama.divergence(model, examples(), replace(CONFIG, batch_size=n), CPU) for n in (1, 6))
    assert one == pytest.approx(all, rel=1e-6)


@pytest.mark.parametrize("rates", [dict(distill_lr=1e-2), dict(lora_lr=1e-2), dict(map_lr=1e-2)])
def test_each_stage_learns_at_its_own_rate(rates):
    config, found = replace(CONFIG, **dict(distill_lr=0.0, lora_lr=0.0) | rates), {}
    for stage in (convert_llama.distill, convert_llama.finetune):
        model = tiny(dtype=torch.float32)
        before = parameters(model)
        stage(model, examples(), config, CPU)
        found[stage.__name__] = {"maps" if ".map_" in name else "rest" for name, p in parameters(model).items()
                                 if not torch.equal(p, before[name])}
    moved = {name: {part} for name, part in (("distill_lr", "maps"), ("lora_lr", "rest"), ("map_lr", "maps"))}
    assert found == dict(distill=moved["distill_lr"] if "distill_lr" in rates else set(),
                         finetune=set() if "distill_lr" in rates else moved[min(rates)])


def test_the_updates_count_alpha_over_rank_times():
    """AdamW's first step is the rate, whatever the gradient, and moves of A B only the B that starts at zero."""
    moved = {}
    for rank, alpha in ((2, 4.0), (2, 8.0), (2, 1.0)):
        model = tiny(kind=None, dtype=torch.float32)
        before = parameters(model)
        config = replace(CONFIG, rank=rank, alpha=alpha, batch_size=6, lora_epochs=1)
        convert_llama.finetune(model, examples(), config, CPU)
        moved[alpha] = parameters(model)["model.layers.0.self_attn.v_proj.weight"]
        moved[alpha] -= before["model.layers.0.self_attn.v_proj.weight"]
    for alpha in (8.0, 1.0):
        torch.testing.assert_close(moved[alpha], moved[4.0] * alpha / 4, rtol=1e-2, atol=1e-6)
    assert moved[4.0].abs().max() > 1e-3


@pytest.mark.parametrize("map_lr", [0.0, 1e-2])
@pytest.mark.parametrize("kind, window", [(None, 0), ("hedgehog", 0), ("hedgehog", 3), ("window", 3)])
def test_lora_adds_low_rank_updates_to_the_projections_and_moves_the_maps_only_if_told_to(kind, window, map_lr):
    model = tiny(kind=kind, window=window, dtype=torch.float32)
    before, first = parameters(model), convert_llama.summary_loss(model, CPU, examples()).item()
    config = replace(CONFIG, map_lr=map_lr, lora_epochs=10, gradient_checkpointing=bool(map_lr))
    convert_llama.finetune(model, examples(), config, CPU)
    assert convert_llama.summary_loss(model, CPU, examples()).item() < first - 0.1
    after = parameters(model)
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    projections = {name for name in before if name.split(".")[-2] in ("q_proj", "k_proj", "v_proj", "o_proj")}
    assert after.keys() == before.keys() and len(projections) == 8
    assert moved == projections | (set(maps_of(model)) if map_lr and kind == "hedgehog" else set())
    for name in projections:
        assert torch.linalg.svdvals(after[name] - before[name])[2:].max() < 1e-4         # --rank 2
    torch.testing.assert_close(parameters(swap_back(model))[min(projections)], after[min(projections)])


def test_only_the_summary_and_its_end_are_learned():
    model, batch = tiny(), examples()[:2]
    ids, mask = samsum.pad([x["ids"] for x in batch], False, CPU)
    labels = ids.masked_fill(mask == 0, -100)
    labels[:, :6] = -100
    expected = model(input_ids=ids, attention_mask=mask, labels=labels, use_cache=False).loss
    assert convert_llama.summary_loss(model, CPU, batch).item() == pytest.approx(expected.item(), rel=1e-5)


# ---------------------------------------------------------------- data and measures

ROWS = [dict(id="1", dialogue="Ann: Hi, are you there?\r\nBob: Yes, \"here\".", summary="Bob is there. "),
        dict(id="2", dialogue="Ann: Lunch, at one?\r\nBob: At two.", summary="They have lunch at two."),
        dict(id="3", dialogue="", summary="Nothing.")] + [
       dict(id=str(i), dialogue=f"Ann: I have {i} apples.\r\nBob: I have {i + 1}.", summary=f"Bob has {i + 1} apples.")
       for i in range(4, 9)]


def write_rows(path, rows=ROWS):
    if path.suffix == ".csv":
        with path.open("w", newline="", encoding="utf-8") as f:
            writer = csv.DictWriter(f, ("id", "summary", "dialogue"))
            writer.writeheader()
            writer.writerows(rows)
    else:
        lines = [json.dumps(row, ensure_ascii=False) for row in rows]
        path.write_text("[" + ",".join(lines) + "]" if path.suffix == ".json" else "\n".join(lines), encoding="utf-8")


@pytest.mark.parametrize("end", ["csv", "json", "jsonl"])
@pytest.mark.parametrize("name, split", [("train", "train"), ("val", "val"), ("validation", "val")])
def test_samsum_is_read_from_csv_and_json(tmp_path, end, name, split):
    write_rows(tmp_path / f"{name}.{end}")
    unusual = dict(ROWS[1], summary="They\u2028have lunch.")                   # a line separator that ends no row
    write_rows(tmp_path / f"test.{end}", [ROWS[0], unusual])
    splits = samsum.read_samsum(tmp_path)
    assert {key: len(rows) for key, rows in splits.items()} == {split: 7, "test": 2}     # the empty one is left out
    assert splits["test"][0] == dict(id="1", dialogue="Ann: Hi, are you there?\nBob: Yes, \"here\".",
                                     summary="Bob is there.")
    assert splits["test"][1]["summary"] == unusual["summary"]


def test_the_training_split_is_learned_where_there_is_one(tmp_path):
    for split, rows in dict(val=ROWS[:1], train=ROWS[3:], test=ROWS[1:2]).items():
        write_rows(tmp_path / f"{split}.csv", rows)
    data, about = convert_llama.prepare(LlamaConfig(data=str(tmp_path)), make_tokenizer())
    assert about["trained_on"] == "train" and len(data["train"]) == about["train_rows"] == 5


@pytest.mark.parametrize("content, told", [(b"\xff\xfe", "cannot be read as text in UTF-8 .*invalid start byte"),
                                           (b"a", "is too short .* .1 in all.: give a longer"), (b"", ".* .0 in all."),
                                           (None, "cannot be read .*No such file.*: give another file")])
@pytest.mark.parametrize("flag", ["--text", "--distill-text", "--lora-text"])
def test_a_text_that_teaches_nothing_is_told_with_its_flag(flag, content, told, folder, tmp_path):
    path = tmp_path / "t.txt"
    if content is not None:
        path.write_bytes(content)
    config = parse(folder, tmp_path / "rows.json", f"{flag} {path}")
    with pytest.raises(ValueError, match=f"{flag} .*t.txt {told}"):
        convert_llama.prepare(config, make_tokenizer())


def test_missing_and_damaged_data_are_told(tmp_path):
    for folder in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(ValueError, match="has to hold SAMSum's test split and train or val.*found neither"):
            samsum.read_samsum(folder)
    write_rows(tmp_path / "val.csv")
    write_rows(tmp_path / "test.csv", [])
    with pytest.raises(ValueError, match="found val: mend --data"):
        samsum.read_samsum(tmp_path)
    for name, text in (("test.json", b"[{"), ("test.json", b'[{"id": 1}]'), ("test.csv", b"id,dialogue\n1,x\n"),
                       ("test.csv", b"\xff\xfe")):
        (tmp_path / name).write_bytes(text)
        with pytest.raises(ValueError, match="is damaged, or lacks one of the columns id, dialogue and summary"):
            samsum.read_samsum(tmp_path)
        (tmp_path / name).unlink()


CHAT = ("{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}<|end|>{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>{% endif %}")


def make_tokenizer(chat=CHAT):
    from tokenizers import ByteLevelBPETokenizer
    text = [f"{row['dialogue']} {row['summary']} {samsum.ASK} Summary:" for row in ROWS]
    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator(text, vocab_size=330, show_progress=False,
                            special_tokens=["<unk>", "<s>", "<|end|>", "<|user|>", "<|assistant|>"])
    return transformers.PreTrainedTokenizerFast(tokenizer_object=bpe._tokenizer, unk_token="<unk>", bos_token="<s>",
                                                eos_token="<|end|>", chat_template=chat)


def test_the_prompt_is_the_models_own_chat_or_plain_and_the_summary_ends():
    row = dict(ROWS[1], dialogue=ROWS[1]["dialogue"].replace("\r", ""))
    for chat, prompt, answer in (
            (CHAT, "<|user|>{ask}\n\n{dialogue}<|end|><|assistant|>", "They have lunch at two.<|end|>"),
            (None, "{ask}\n\n{dialogue}\n\nSummary:", " They have lunch at two.<|end|>")):
        tokenizer = make_tokenizer(chat)
        x = samsum.encode(tokenizer, row, 200)
        assert tokenizer.decode(x["ids"][:x["n_prompt"]]) == prompt.format(ask=samsum.ASK, **row)
        assert tokenizer.decode(x["ids"][x["n_prompt"]:]) == answer and not x["cut"]
        asked = samsum.encode(tokenizer, row, 200, with_summary=False)
        assert asked["ids"] == x["ids"][:x["n_prompt"]]


def test_a_long_dialogue_loses_its_end_and_nothing_else():
    tokenizer = make_tokenizer()
    row = dict(id="1", dialogue="Ann: I have 4 apples.\n" * 40, summary="Ann has apples.")
    x = samsum.encode(tokenizer, row, 100)
    text = tokenizer.decode(x["ids"])
    assert x["cut"] and 90 < len(x["ids"]) <= 100
    assert text.startswith(f"<|user|>{samsum.ASK}\n\nAnn: I have 4") and text.endswith("Ann has apples.<|end|>")
    with pytest.raises(ValueError, match="--max-length 10 is too short"):
        samsum.encode(tokenizer, row, 10)


def test_padding_is_on_the_side_that_is_asked_for():
    left = samsum.pad([[5, 6], [7]], True, CPU, fill=9)
    right = samsum.pad([[5, 6], [7]], False, CPU)
    assert [x.tolist() for x in left] == [[[5, 6], [9, 7]], [[1, 1], [0, 1]]]
    assert [x.tolist() for x in right] == [[[5, 6], [7, 0]], [[1, 1], [1, 0]]]


def test_rouge_is_counted_by_hand():
    # "the cat sat" and "the cats ran": 2 of 3 words (stemmed), 1 of 2 pairs, a common subsequence of 2.
    assert samsum.rouge(["the cat sat"], ["the cats ran"]) == pytest.approx(
        dict(rouge1=200 / 3, rouge2=50, rougeL=200 / 3))
    # "a b c d" and "c a": recall 2/4, precision 2/2 -> 2/3; no pair; subsequence 1: 1/4, 1/2 -> 1/3. Means of the two.
    assert samsum.rouge(["a b c d", "x"], ["c a", "x"]) == pytest.approx(
        dict(rouge1=100 * (2 / 3 + 1) / 2, rouge2=0, rougeL=100 * (1 / 3 + 1) / 2))


def test_summaries_come_in_the_order_of_the_dialogues_whatever_the_batch():
    model, tokenizer = tiny(vocab_size=330, dtype=torch.float32), make_tokenizer()
    prompts = [samsum.encode(tokenizer, row, 200, False) for row in ROWS[:2] + ROWS[3:]]
    config = LlamaConfig(max_new_tokens=5)
    one = [convert_llama.summarize(model, tokenizer, [prompt], config, CPU)[0] for prompt in prompts]
    assert convert_llama.summarize(model, tokenizer, prompts, replace(config, generate_batch=4), CPU) == one
    assert len(set(one)) > 1


@pytest.mark.parametrize("n", [2, 9, 12, 30])
def test_every_token_of_the_text_but_the_first_is_predicted_once(n, monkeypatch):
    monkeypatch.setattr(convert_llama, "BLOCK", 4)
    model, ids = tiny(kind=None), some_ids(1, n)[0]
    nats = [torch.nn.functional.cross_entropy(logits(model, ids[None, t // 4 * 4:t + 1])[0, -1], ids[t + 1]).item()
            for t in range(n - 1)]
    found = convert_llama.text_perplexity(model, ids.tolist(), CPU)
    assert found == pytest.approx(math.exp(sum(nats) / len(nats)), rel=1e-5)


# ---------------------------------------------------------------- the experiment


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny model with a tokenizer, a SAMSum of seven dialogues and a text."""
    folder = tmp_path_factory.mktemp("llama")
    tiny(kind=None, dtype=torch.float32, vocab_size=330, initializer_range=0.05).save_pretrained(folder / "model")
    make_tokenizer().save_pretrained(folder / "model")
    (folder / "data").mkdir()
    write_rows(folder / "data" / "val.csv")
    write_rows(folder / "data" / "test.csv", ROWS[:2] + ROWS[4:])
    (folder / "text.txt").write_text("Ann has lunch at two. " * 30)
    return folder


def parse(folder, out, flags=""):
    given = (f"--model {folder / 'model'} --data {folder / 'data'} --text {folder / 'text.txt'} --device cpu "
             f"--batch-size 4 --max-new-tokens 4 --generate-lengths 8 16 --speed-batch 2 --out {out} {flags}")
    return parse_config(LlamaConfig, argv=given.split())


def test_the_whole_table_is_made(folder, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(convert_llama, "SPEED_TOKENS", 3)
    monkeypatch.setattr(convert_llama, "BLOCK", 16)
    monkeypatch.setattr(sys, "argv", ["/a/convert_llama.py", "--model", f"{folder}/model", "--lora-lr", "runs/b"])
    out = tmp_path / "results" / "llama.json"
    config = parse(folder, out, "--attentions softmax hedgehog elu --limit 4")
    convert_llama.main(config)
    rows = {row["attention"]: row for row in json.loads(out.read_text())}
    assert list(rows) == ["zero-shot", "softmax", "hedgehog", "elu"]
    for name, row in rows.items():
        assert all(0 <= row[key] <= 100 for key in ("rouge1", "rouge2", "rougeL")) and row["text_ppl"] > 1
        assert row["tokens_per_second"].keys() == {"8", "16"} and len(row["samples"]) == 3
        assert (row["trained_on"], row["train_rows"], row["test_rows"]) == ("val", 4, 4)
        assert {"commit", "device", "torch", "lora_lr"} <= row.keys()
        assert ("kl" in row) == (name == "hedgehog") and ("lora_seconds" in row) == (name != "zero-shot")
        assert ("text_first_block_ppl" in row) == (name == "zero-shot")
        assert (row["model"], row["data"], row["text"], row["distill_text"]) == ("model", "data", "text.txt", "")
        assert row["command"] == "python convert_llama.py --model model --lora-lr runs/b"
    assert str(folder) not in out.read_text()
    printed = capsys.readouterr().out
    assert "trained on 4 dialogues of SAMSum's val split, tested on 4 of test" in printed
    assert "hedgehog + LoRA" in printed and "a person     Bob is there." in printed
    # What was loaded can be checked by anyone: the perplexity of the text, and of its first block.
    model = convert_llama.load(config, transformers.AutoModelForCausalLM, dtype=torch.float32)
    tokenizer = convert_llama.load(config, transformers.AutoTokenizer)
    ids = samsum.read_text(folder / "text.txt", tokenizer, "--text")
    for key, part in (("text_ppl", ids), ("text_first_block_ppl", ids[:16])):
        assert rows["zero-shot"][key] == pytest.approx(convert_llama.text_perplexity(model, part, CPU), rel=1e-4)
    assert f"perplexity of the first 16 tokens of the text: {rows['zero-shot']['text_first_block_ppl']:.2f}" in printed


def test_each_row_starts_from_the_model_as_it_came_and_learns_no_test_dialogue(folder, tmp_path, monkeypatch):
    given, starts, real = {}, [], convert_llama.measure_row

    def watch(name):
        function = getattr(convert_llama, name)
        monkeypatch.setattr(convert_llama, name, lambda *args: (given.setdefault(name, args[1]), function(*args))[1])

    for name in ("distill", "finetune", "divergence"):
        watch(name)
    monkeypatch.setattr(convert_llama, "measure_row",
                        lambda name, model, *rest: (starts.append(parameters(model)), real(name, model, *rest))[1])
    monkeypatch.setattr(convert_llama, "summarize", lambda *args: ["Bob is not there.", *[""] * 5])
    config = parse(folder, tmp_path / "rows.json", "--attentions softmax hedgehog t2r --generate-lengths 0 --lora-lr 1")
    convert_llama.main(config)
    assert len(starts) == 4 and all(torch.equal(p, start[name]) for start in starts for name, p in starts[0].items())
    assert all(start.keys() == starts[0].keys() for start in starts)
    splits, tokenizer = samsum.read_samsum(folder / "data"), make_tokenizer()
    for name, split in (("distill", "val"), ("finetune", "val"), ("divergence", "test")):
        assert given[name] == [samsum.encode(tokenizer, row, 1024) for row in splits[split]]
    rows = json.loads((tmp_path / "rows.json").read_text())                # "Bob is there.", and what is not empty
    assert rows[0]["rouge1"] == pytest.approx(100 * 6 / 7 / len(splits["test"]))


def test_the_table_compares_with_softmax_after_lora():
    def row(name, **numbers):
        return dict(attention=name, rouge2=0.0, rougeL=0.0, samples=[], tokens_per_second={"8": 1234.0, "16": None},
                    generate_gib={"8": 1.5, "16": None}, generate_seconds=1.0, **numbers)
    lines = convert_llama.table([
        row("zero-shot", rouge1=10.0, text_ppl=20.0), row("softmax", rouge1=40.0, text_ppl=16.0, lora_seconds=2.0,
                                                          lora_gib=3.0),
        row("hedgehog", rouge1=30.0, text_ppl=24.0, distill_seconds=4.0, distill_gib=7.0, lora_seconds=2.0,
            lora_gib=None), row("elu", rouge1=20.0, lora_seconds=2.0)]).splitlines()
    cells = [" ".join(line.split()) for line in lines]
    speeds = "1,234.00, 1.50 -, -"
    assert cells == [
        "R1 R2 RL / softmax paper's text ppl / softmax seconds GiB tok/s, GiB@8 tok/s, GiB@16",
        f"zero-shot 10.00 0.00 0.00 0.25 0.38 20.00 1.25 1.00 - {speeds}",
        f"softmax + LoRA 40.00 0.00 0.00 1.00 1.00 16.00 1.00 3.00 3.00 {speeds}",
        f"hedgehog + LoRA 30.00 0.00 0.00 0.75 0.93 24.00 1.50 7.00 7.00 {speeds}",
        f"elu + LoRA 20.00 0.00 0.00 0.50 - - - 3.00 - {speeds}"]
    assert len({len(line) for line in lines}) == 1


def permuted(weight, n_head):
    """The rows of a q or k projection as llama.cpp has them: the two of a rotated pair side by side."""
    return weight.unflatten(0, (n_head, 2, -1)).transpose(1, 2).reshape(weight.shape)


def write_gguf(path, model, tokenizer):
    gguf, shape = pytest.importorskip("gguf", reason="pip install -r requirements-experiments.txt"), model.config
    writer, bpe = gguf.GGUFWriter(str(path), "llama"), json.loads(tokenizer._tokenizer.to_str())["model"]
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, shape.num_hidden_layers)
    for key, value in dict(
            context_length=shape.max_position_embeddings, embedding_length=shape.hidden_size, vocab_size=330,
            block_count=shape.num_hidden_layers, feed_forward_length=shape.intermediate_size, rope_dimension_count=8,
            head_count=shape.num_attention_heads, head_count_kv=shape.num_key_value_heads, bos_token_id=1,
            layer_norm_rms_eps=shape.rms_norm_eps, eos_token_id=EOS, tokenizer_model="gpt2",
            token_list=sorted(bpe["vocab"], key=bpe["vocab"].get), token_merges=map(" ".join, bpe["merges"])).items():
        getattr(writer, f"add_{key}")(list(value) if isinstance(value, map) else value)
    heads = dict(q_proj=shape.num_attention_heads, k_proj=shape.num_key_value_heads)
    for name, p in model.state_dict().items():
        n_head = heads.get(name.split(".")[-2])
        p = permuted(p, n_head) if n_head else p
        writer.add_tensor(names.get_name(name, try_suffixes=(".weight",)), p.contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_a_gguf_of_llama_cpp_gives_the_logits_it_was_made_of(tmp_path, monkeypatch):
    model, tokenizer, path = tiny(kind=None, dtype=torch.float32, vocab_size=330), make_tokenizer(), tmp_path / "x.gguf"
    write_gguf(path, model, tokenizer)
    load = partial(convert_llama.load, LlamaConfig(model=str(path)))
    loaded, read = load(transformers.AutoModelForCausalLM, dtype=torch.float32), load(transformers.AutoTokenizer)
    torch.testing.assert_close(logits(loaded, some_ids()), logits(model, some_ids()))
    assert loaded.dtype == torch.float32 and read("Ann: Hi").input_ids == tokenizer("Ann: Hi").input_ids
    whole = path.read_bytes()
    for damaged in (whole[:100], whole[:3000], whole[:-1000], b""):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match="no Llama with a tokenizer at --model .*x.gguf: give a folder"):
            load(transformers.AutoModelForCausalLM)
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(ValueError, match="x.gguf is read with gguf: pip install -r requirements-experiments.txt"):
        load(transformers.AutoTokenizer)


@pytest.mark.parametrize("flag", ["--data", "--text", "--distill-text", "--lora-text"])
def test_a_missing_file_is_told_before_the_model_is_read(flag, folder, tmp_path, monkeypatch):
    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained",
                        lambda *args, **kwargs: pytest.fail("reads the model first"))
    with pytest.raises(ValueError, match=flag):
        convert_llama.main(parse(folder, tmp_path / "rows.json", f"{flag} {tmp_path}/nowhere"))


def test_an_interrupted_run_goes_on_with_what_is_missing(folder, tmp_path, monkeypatch, capsys):
    out, real, made = tmp_path / "rows.json", convert_llama.measure_row, []
    flags = "--attentions softmax elu --limit 2 --generate-lengths 0"

    def measure(name, *args):
        if name == "elu" and len(made) == 2:
            raise KeyboardInterrupt
        made.append(name)
        return real(name, *args)

    monkeypatch.setattr(convert_llama, "measure_row", measure)
    with pytest.raises(KeyboardInterrupt):
        convert_llama.main(parse(folder, out, flags))
    monkeypatch.setattr(convert_llama, "measure_row", lambda name, *args: (made.append(name), real(name, *args))[1])
    convert_llama.main(parse(folder, out, flags))
    assert "nothing is trained" not in capsys.readouterr().out
    shutil.copytree(folder, tmp_path / "elsewhere")
    monkeypatch.setattr(convert_llama, "load", None)
    convert_llama.main(parse(tmp_path / "elsewhere", out, flags))                         # names alone count
    assert made == ["zero-shot", "softmax", "elu"]
    assert f"{out} has all these rows already, nothing is trained: choose another --out" in capsys.readouterr().out
    with pytest.raises(ValueError, match="holds rows made with --lora-lr .*, --rank 8: give the same --lora-lr, --rank"
                                         ", or choose another --out"):
        convert_llama.main(parse(folder, out, flags + " --lora-lr 1 --rank 3"))


def test_t2r_may_have_a_rate_of_its_own_which_its_row_keeps(folder, tmp_path, monkeypatch):
    rates, out = [], tmp_path / "rows.json"
    monkeypatch.setattr(convert_llama, "distill", lambda *args: rates.append(args[2].distill_lr) or 0.0)
    flags = "--limit 2 --generate-lengths 0 --lora-epochs 0 --distill-lr 2e-2 --attentions softmax hedgehog"
    convert_llama.main(parse(folder, out, flags))                                          # whose rows it joins
    convert_llama.main(parse(folder, out, f"{flags} t2r --distill-lr-t2r 1e-3"))
    kept = {row["attention"]: row.get("distill_rate") for row in json.loads(out.read_text())}
    assert rates == [2e-2, 1e-3] and kept == {"zero-shot": None, "softmax": None, "hedgehog": 2e-2, "t2r": 1e-3}
    for other in ("", "--distill-lr-t2r 2e-2"):
        with pytest.raises(ValueError, match="rows made with --distill-lr-t2r 0.001: give the same --distill-lr-t2r"):
            convert_llama.main(parse(folder, out, f"{flags} {other}"))
    convert_llama.main(parse(folder, tmp_path / "same.json", f"{flags} t2r"))
    assert rates[2:] == [2e-2, 2e-2]


def test_rows_have_one_hybrid_window_and_beside_hybrids_its_control(folder, tmp_path, capsys):
    out, flags = tmp_path / "rows.json", "--limit 2 --generate-lengths 8"
    convert_llama.main(parse(folder, out, f"{flags} --hybrid-window 3 --attentions softmax hedgehog elu window"))
    printed, rows = capsys.readouterr().out, json.loads(out.read_text())
    assert "hybrid window 3 " in printed and "window + LoRA" in printed
    assert {row["hybrid_window"] for row in rows} == {3}
    kept = {row["attention"]: {"kl_before", "kl", "distilled_text_ppl", "lora_seconds"} & row.keys() for row in rows}
    assert kept["hedgehog"] == kept["elu"] == {"kl_before", "kl", "distilled_text_ppl", "lora_seconds"}  # gates learn
    assert kept["window"] == {"distilled_text_ppl", "lora_seconds"}
    assert len({row["text_ppl"] for row in rows}) == len(rows)
    for other in ("", "--hybrid-window 4"):
        with pytest.raises(ValueError, match="rows made with --hybrid-window 3: give the same --hybrid-window"):
            convert_llama.main(parse(folder, out, f"{flags} {other}"))


def test_committed_rows_of_before_there_was_a_hybrid_can_be_continued(tmp_path, monkeypatch):
    out, made, committed = tmp_path / "x.json", [], ROOT / "experiments" / "results" / "llama.json"
    rows = [row for row in json.loads(committed.read_text()) if row["attention"] != "t2r"]  # whose --distill-lr differs
    out.write_text(json.dumps(rows))
    names = {f.name for f in fields(LlamaConfig)} - convert_llama.MAY_DIFFER
    settings = {k: tuple(v) if isinstance(v, list) else v for k, v in rows[-1].items() if k in names}
    config = LlamaConfig(**settings, out=str(out), attentions=("elu",))
    monkeypatch.setattr(convert_llama, "load", lambda *args: made.append("loaded") or sys.exit())
    with pytest.raises(SystemExit):  # all is well up to here
        convert_llama.main(config)
    assert made == ["loaded"] and "hybrid_window" not in rows[-1]
    with pytest.raises(ValueError, match="holds rows made with --hybrid-window 0: give the same --hybrid-window"):
        convert_llama.main(replace(config, hybrid_window=64))


def test_the_defaults_touch_no_committed_rows():
    config = LlamaConfig()
    assert config.out == "runs/llama.json" and {"softmax", "hedgehog", "hedgehog_exp", "t2r"} == {*config.attentions}


@pytest.mark.parametrize("kind, window", [(None, 0), ("hedgehog", 0), ("hedgehog", 3), ("window", 3)])
def test_the_speed_is_that_of_the_whole_batch_after_a_prompt_read_in_pieces(kind, window, monkeypatch):
    model, config, clock, widths = tiny(2, kind, window, torch.float32), LlamaConfig(speed_batch=3), iter(range(99)), []
    monkeypatch.setattr(convert_llama, "BLOCK", 4)
    monkeypatch.setattr(convert_llama, "time", SimpleNamespace(perf_counter=lambda: next(clock) / 2))
    real, written = model.generate, []
    monkeypatch.setattr(model, "generate", lambda **options: written.append((options, real(**options))))
    hook = model.model.embed_tokens.register_forward_hook(lambda module, args, y: widths.append(y.shape[:2]))
    assert convert_llama.speed(model, 10, config, CPU) == (3 / 0.5, None)
    assert widths == [(3, 4), (3, 4), (3, 2)] + [(3, 1)] * (convert_llama.SPEED_TOKENS - 1)
    hook.remove()
    (options, tokens), = written
    del options["prefill_chunk_size"]
    assert torch.equal(tokens, real(**options))                               # in pieces or not


def test_a_length_that_does_not_fit_costs_no_row(monkeypatch):
    model = tiny(dtype=torch.float32)
    config = LlamaConfig(speed_batch=2)
    tokens, gib = convert_llama.speed(model, 8, config, CPU)
    assert tokens > 0 and gib is None

    def full(*args, **kwargs):
        raise torch.OutOfMemoryError

    monkeypatch.setattr(model, "generate", full)
    assert convert_llama.speed(model, 8, config, CPU) == (None, None)


def test_a_second_text_may_be_read_while_distilling(folder, tmp_path):
    config = parse(folder, tmp_path / "rows.json", f"--distill-text {folder / 'text.txt'} --max-length 90")
    data, _ = convert_llama.prepare(config, make_tokenizer())
    assert len(data["distill"]) > len(data["train"]) == 7
    assert [t for x in data["distill"][7:] for t in x["ids"]] == data["text"]


def test_the_table_has_its_updates_learn_the_text(folder, tmp_path, monkeypatch):
    real, learned = convert_llama.finetune, []
    monkeypatch.setattr(convert_llama, "finetune", lambda *args: (learned.append(args[4]), real(*args))[1])
    flags = f"--attentions softmax --limit 2 --generate-lengths 0 --lora-text {folder / 'text.txt'}"
    convert_llama.main(parse(folder, tmp_path / "rows.json", flags))
    ids = samsum.read_text(folder / "text.txt", make_tokenizer(), "--lora-text")
    assert [[t for x in text for t in x["ids"]] for text in learned] == [ids]


def test_a_text_may_be_learned_before_the_summaries(folder, tmp_path):
    text = folder / "text.txt"
    config = parse(folder, tmp_path / "rows.json", f"--lora-text {text} --text {text} --max-length 90")
    data, _ = convert_llama.prepare(replace(config, lora_epochs=1), make_tokenizer())
    assert [t for x in data["lora_text"] for t in x["ids"]] == data["text"]
    model = tiny(dtype=torch.float32, vocab_size=330, initializer_range=0.05)
    before = convert_llama.text_perplexity(model, data["text"], CPU)
    plain, told = copy.deepcopy(model), copy.deepcopy(model)
    convert_llama.finetune(plain, data["train"], CONFIG, CPU)
    convert_llama.finetune(told, data["train"], CONFIG, CPU, data["lora_text"] * 20)
    after = [convert_llama.text_perplexity(m, data["text"], CPU) for m in (plain, told)]
    assert after[1] < 0.8 * min(after[0], before)
    ids = torch.tensor([data["lora_text"][0]["ids"]])                                     # all tokens but the first
    expected = told(input_ids=ids, labels=ids).loss
    torch.testing.assert_close(convert_llama.summary_loss(told, CPU, data["lora_text"][:1]), expected)


@pytest.mark.parametrize("flags, sentence", [
    ("--model {tmp}/gpt2", "GPT2LMHeadModel is not of the Llama architecture; supported is"),
    ("--model {tmp}/nothing.gguf", "no Llama with a tokenizer at .*nothing.gguf"),
    ("--model {tmp}", "give a folder with config.json, a .gguf file or a name on the hub"),
    ("--data {tmp}/nowhere", "nowhere has to hold SAMSum's test split"),
    ("--out {tmp}/rows.txt", "rows.txt must end in .json"),
    ("--out /dev/null/rows.json", "cannot write --out /dev/null/rows.json: choose another"),
    ("--max-length 0", "--max-length must be at least 1"),
    ("--limit -1", "--limit must be at least 0"),
    ("--hybrid-window -1", "--hybrid-window must be at least 0"),
    ("--attentions softmax window", "softmax over the last tokens alone: say how many by --hybrid-window"),
    ("--generate-lengths 8 -8", "--generate-lengths must be at least 0"),
    ("--distill-epochs -1", "--distill-epochs must be at least 0"),
    ("--lora-epochs -1", "--lora-epochs must be at least 0"),
    ("--distill-lr-t2r -1", "--distill-lr-t2r must be at least 0"),
    ("--lora-lr nan", "--lora-lr must be at least 0"),
    ("--distill-lr 1e30 --attentions hedgehog_exp --distill-epochs 9", "the loss is .*: lower the learning rate"),
])
def test_bad_input_is_told_in_a_sentence(flags, sentence, folder, tmp_path):
    if "gpt2" in flags:
        config = transformers.GPT2Config(n_layer=1, n_head=2, n_embd=8, vocab_size=330)
        transformers.GPT2LMHeadModel(config).save_pretrained(tmp_path / "gpt2")
        make_tokenizer().save_pretrained(tmp_path / "gpt2")
    with pytest.raises(ValueError, match=sentence):
        convert_llama.main(parse(folder, tmp_path / "rows.json", flags.format(tmp=tmp_path)))


def test_it_can_be_imported_from_the_root_of_the_repository():
    code = "from experiments.hedgehog_llama import swap, swap_back; import experiments.convert_llama"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


def test_a_missing_package_names_the_requirements_file():
    code = ("import sys, runpy; sys.modules['peft'] = None; sys.argv = ['x']; "
            f"runpy.run_path({str(ROOT / 'experiments' / 'convert_llama.py')!r}, run_name='__main__')")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 2 and "peft" in done.stderr
    assert done.stderr.strip().endswith("pip install -r requirements-experiments.txt")
