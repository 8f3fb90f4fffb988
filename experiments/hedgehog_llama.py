"""Linear attention in a Llama of the transformers library: rotary embeddings, grouped queries, padding, and a decoding
state in the model's own cache, so that `generate()` costs the same time and memory a token however long the past.

    swap(model, "hedgehog")       in place; the maps are the only new parameters, and start as the identity
    model.generate(...)           as before
    swap_back(model)              the softmax model again

Letters are those of hedgehog.py; besides them K is the number of key-value heads, each of which serves G = H / K query
heads. convert_llama.py distils and finetunes what this makes.
"""

import inspect
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from transformers.cache_utils import DynamicLayer
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaModel, apply_rotary_pos_emb

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # for hedgehog.py, which is no installed package
from hedgehog import FeatureMap, HybridAttention, divide, linear_attention  # noqa: E402

MAPS = ("hedgehog", "hedgehog_exp", "t2r", "elu", "relu")


class StateLayer(DynamicLayer):
    """One layer's past in a cache of transformers: in place of the keys, a state (B, K, P, D+1). A hybrid's window of
    W tokens has its values (B, K, W, D+1) before that state, and its keys (B, K, W, D) in place of the values."""

    is_croppable, length = False, 0

    def store(self, state, window, n_new):
        self.length, self.is_initialized, self.device = self.get_seq_length() + n_new, True, state.device
        self.keys, self.values = state, window  # what a cache does to its keys for beams, it does to the state

    def get_seq_length(self):
        return self.length if self.is_initialized else 0

    def update(self, *args, **kwargs):
        raise ValueError("this cache holds the state of linear attention, which softmax cannot continue and which "
                         "cannot forget its last tokens (assisted generation): start with an empty cache")

    crop = update


def state_layer(cache, index):
    """The StateLayer of a cache; takes the place of the empty layer for keys that generate() made there."""
    if not hasattr(cache, "layers"):
        raise ValueError("linear attention keeps its state in a cache of layers, and has no place in the "
                         f"{type(cache).__name__} of generate_batch(): call generate()")
    while len(cache.layers) <= index:
        cache.layers.append(StateLayer())
    if type(cache.layers[index]) is DynamicLayer and not cache.layers[index].get_seq_length():
        cache.layers[index] = StateLayer()
    layer = cache.layers[index]
    if not isinstance(layer, StateLayer):
        why = ("continue one that holds keys of softmax: start with an empty one" if layer.get_seq_length() else
               f"use one of {type(layer).__name__}: leave out cache_implementation, or pass an empty DynamicCache()")
        raise ValueError(f"linear attention keeps its state in a cache of the default kind, and cannot {why}")
    return layer


def visible_keys(mask, position_ids, T, past, check=True):
    """(B, T) bool: which of the T new keys count, from what transformers hands to a layer. None: all of them.

    The mask is None, (B, S) of flash attention, or (B, 1, T, S), bool (sdpa) or 0 and -inf (eager), S = past + T. The
    last query sees every key but padding, so its row tells the padding. `check`: refuse a mask that holds more. Keys of
    the past are in the state for good: with T = 1 a mask that hides some of them is not told from padding, and ignored.
    """
    keys, why = None, ""
    if mask is None:  # positions that start again are packed sequences, of which flash attention has no mask
        if check and position_ids is not None and (position_ids.diff(dim=-1) != 1).any():
            why = "position_ids that do not count up by one, as those of packed sequences"
    elif not isinstance(mask, torch.Tensor):
        why = f"the {type(mask).__name__} of flex_attention"
    elif mask.shape[-1] != past + T:
        why = f"a mask of {mask.shape[-1]} keys where there are {past + T}"
    elif mask.ndim == 2:
        keys = mask[:, -T:].bool()
    else:
        seen, hidden = (mask, ~mask) if mask.dtype == torch.bool else (mask == 0, mask < -1e4)
        keys = seen[:, 0, -1, -T:]
        why = more_than_padding(seen, hidden, past) if check else ""
    if why:
        raise ValueError(f"linear attention can leave out padding and nothing else, and so cannot honour {why}: load "
                         'the model with attn_implementation "sdpa" or "eager" and give it nothing but a (B, S) mask '
                         "of padding, or swap_back(model)")
    return keys


def more_than_padding(seen, hidden, past):
    """What a causal mask (B, 1 or H, T, S) holds besides padding, in words; "" if nothing."""
    causal = torch.ones_like(seen[0, 0]).tril(past)                                       # (T, S)
    expected = causal & seen[:, :1, -1:]                                                  # (B, 1, T, S)
    if ((seen == expected) & (hidden != expected)).all():
        return ""
    if (seen == hidden).any():
        return "a bias on q.k (ALiBi)"
    if (seen != seen[:, :1]).any():
        return "a mask that differs from head to head"
    if (seen & ~causal).any():
        return "a mask that shows a token later ones (a prefix)"
    if (seen[..., 1:, 1:] == seen[..., :-1, :-1]).all():
        return "a sliding window"
    return "a mask that hides tokens from some later ones (packed sequences, or a sliding window beside padding)"


class NoMap(torch.nn.Module):
    """No features, so that nothing weighs anything but a hybrid's window: the row `window`, its control."""

    feature_dim = 0

    def forward(self, x, is_query=False):
        return x[..., :0]

    def log_shift(self, x):
        return 0


class HedgehogLlamaAttention(LlamaAttention):
    """A LlamaAttention whose class `swap` has changed: its projections and rotation, then maps and linear attention.

    A map for each of the H query heads and for each of the K key-value heads: as many keys as softmax has, so that the
    state is G times smaller than with the keys repeated first, as in LoLCATs. A `hybrid` holds the maps if there is
    one. Its window counts places, and so visible tokens where padding is left or right of a text, but not inside, where
    it is once a prompt that is padded on the right is continued from the cache.
    """

    window = 0  # of the hybrid, which has one of its own

    def rotated(self, hidden_states, position_embeddings):
        """q (B, H, T, D), k and v (B, K, T, D), as softmax would get them."""
        q, k, v = (projection(hidden_states).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
                   for projection in (self.q_proj, self.k_proj, self.v_proj))
        return *apply_rotary_pos_emb(q, k, *position_embeddings), v

    def forward(self, hidden_states, position_embeddings, attention_mask=None, past_key_values=None, cache=None,
                position_ids=None, **kwargs):
        """hidden_states (B, T, C) -> (B, T, C), None. `cache` and `past_key_values`: the same, by version."""
        cache = past_key_values if cache is None else cache
        layer = StateLayer() if cache is None else state_layer(cache, self.layer_idx)
        q, k, v = self.rotated(hidden_states, position_embeddings)
        T = q.shape[2]
        check, past = T > 1 and self.layer_idx == 0, layer.get_seq_length()
        keys = visible_keys(attention_mask, position_ids, T, past, check)
        if self.hybrid:
            state = None
            if layer.keys is not None:
                state = layer.values, *layer.keys.tensor_split([self.hybrid.window], dim=2)
            y, (window_k, window_v, S) = self.hybrid.attend(q, k, v, "auto", state, True, past, keys=keys)
            layer.store(torch.cat((window_v, S), dim=2), window_k, T)
        else:
            phi_q, phi_k = self.map_q(q, is_query=True), self.map_k(k)                    # (B, H or K, T, P)
            if keys is not None:
                phi_k = phi_k.masked_fill(~keys[:, None, :, None], 0)                     # counts as no key
            y, state = grouped_attention(phi_q, phi_k, v.to(phi_k.dtype), layer.keys)
            layer.store(state, state[..., :0], T)
        return self.o_proj(y.to(v.dtype).transpose(1, 2).flatten(2)), None


def grouped_attention(q, k, v, state=None, eps=1e-30):
    """`linear_attention` for q (B, H, T, P), k (B, K, T, P), v (B, K, T, D) -> y (B, H, T, D), state (B, K, P, D+1).

    The query heads of a group read one state. A single token is an outer product added to it and a product with the G
    queries; more of them are `linear_attention` with the keys repeated.
    """
    (B, H, T, _), K = q.shape, k.shape[1]
    G = H // K
    if T > 1 or state is None:
        k, v, S = (x if x is None else x.repeat_interleave(G, dim=1) for x in (k, v, state))
        y, S = linear_attention(q, k, v, "chunked", state=S, return_state=True, eps=eps)
        return y, S[:, ::G]
    S = torch.addcmul(state, k.mT, F.pad(v, (0, 1), value=1.0))                           # (B, K, P, D+1)
    y = (q.view(B, K, G, -1) @ S).view(B, H, 1, -1)
    return divide(y[..., :-1], y[..., -1:], eps), S


def llama_layers(model):
    if hasattr(model, "get_base_model"):
        raise ValueError("a PeftModel hides the layers: swap(model) before get_peft_model, or pass get_base_model()")
    if isinstance(model, LlamaModel):
        raise ValueError("a LlamaModel has no head to write with: pass the LlamaForCausalLM whose .model it is")
    layers = getattr(getattr(model, "model", None), "layers", [])
    if not layers or not all(isinstance(layer.self_attn, LlamaAttention) for layer in layers):
        raise ValueError(f"{type(model).__name__} is not of the Llama architecture; supported is LlamaForCausalLM of "
                         "transformers (model_type 'llama': Llama 1 to 3, SmolLM2, TinyLlama, Vicuna ...)")
    if any("forward" in vars(layer.self_attn) for layer in layers):  # which hides that of any class
        raise ValueError("the attention has a forward of its own, as accelerate gives it in a model on several "
                         "devices: load it without device_map, and call accelerate.dispatch_model() when it is swapped")
    return layers


def swap(model, kind="hedgehog", hybrid_window=0, **map_options):
    """Linear attention in every layer of a Llama of transformers, in place. Returns the model; `swap_back` undoes it.

    kind: one of MAPS; it and map_options as in hedgehog.FeatureMap. Projections stay, with their names. Rotated
    features depend on where a token stands, and not only on how far it is from others, so positions that are not given
    are counted from the first token that is not padding, also where transformers would count the padding.
    hybrid_window: softmax weighs the last so many tokens and the map older ones, as in hedgehog.HybridAttention, in
    plain PyTorch; the kind "window" has nothing for them.
    """
    if kind not in (*MAPS, "window"):
        raise ValueError(f"{kind!r} is not a map of single heads and positions: choose one of {', '.join(MAPS)}")
    layers, maps = llama_layers(model), []
    H, K = model.config.num_attention_heads, model.config.num_key_value_heads
    for i, layer in enumerate(layers):  # all of them before the first is changed
        attention, weight = layer.self_attn, layer.self_attn.k_proj.weight
        D, rows = attention.head_dim, (attention.q_proj.out_features, attention.k_proj.out_features)
        if rows != (H * D, K * D) or H % K:
            raise ValueError(f"a head width that does not match: {H} and {K} heads of {D} are not layer {i}'s "
                             f"{rows[0]} queries and {rows[1]} keys: load the model with the config it was saved with")
        dtype = torch.promote_types(weight.dtype, torch.float32)
        alone, hybrid = kind == "window", None
        map_q, map_k = (NoMap() if alone else FeatureMap(n, D, kind, **map_options) for n in (H, K))
        if hybrid_window or alone:
            hybrid = HybridAttention(H, D, "elu" if alone else kind, window=hybrid_window)
            hybrid.map_q, hybrid.map_k, map_q, map_k = map_q, map_k, None, None
        maps.append([module and module.to(weight.device, dtype) for module in (map_q, map_k, hybrid)])
    swap_back(model)
    for layer, made in zip(layers, maps):
        layer.self_attn.__class__ = HedgehogLlamaAttention
        layer.self_attn.map_q, layer.self_attn.map_k, layer.self_attn.hybrid = made
    model.model.position_hook = model.model.register_forward_pre_hook(count_positions, with_kwargs=True)
    return model


def swap_back(model):
    """The softmax attention again, with the projections as they are now. Returns the model."""
    for layer in llama_layers(model):
        if isinstance(layer.self_attn, HedgehogLlamaAttention):
            layer.self_attn.__class__ = LlamaAttention
            del layer.self_attn.map_q, layer.self_attn.map_k, layer.self_attn.hybrid
    if hasattr(model.model, "position_hook"):
        model.model.position_hook.remove()
        del model.model.position_hook
    return model


def count_positions(module, args, kwargs):
    """Before LlamaModel.forward: position_ids from a (B, S) or (B, 1, T, S) attention_mask, unless they are given."""
    kwargs = dict(zip(inspect.signature(module.forward).parameters, args)) | kwargs
    if kwargs.get("output_attentions", getattr(module.config, "output_attentions", False)):
        raise ValueError("linear attention forms no weights: leave out output_attentions, or swap_back(model)")
    mask = kwargs.get("attention_mask")
    if isinstance(mask, torch.Tensor) and mask.ndim == 4:  # its last query's row, as in `visible_keys`
        mask = mask[:, 0, -1] if mask.dtype == torch.bool else mask[:, 0, -1] == 0
    if kwargs.get("position_ids") is None and isinstance(mask, torch.Tensor) and mask.ndim == 2:
        T = next(kwargs[name] for name in ("input_ids", "inputs_embeds") if kwargs.get(name) is not None).shape[1]
        kwargs["position_ids"] = (mask.long().cumsum(-1) - 1).clamp(min=0)[:, -T:]
    return (), kwargs
