"""Put Hedgehog into a Llama of the transformers library: distil its attention, then LoRA, on summaries of dialogues.

    python experiments/convert_llama.py --model FOLDER --data data/samsum             the table: softmax, Hedgehog, T2R
    python experiments/convert_llama.py --model SmolLM2-135M-Instruct.Q4_1.gguf ...   a GGUF file will do
    python experiments/convert_llama.py ... --text wiki.test.raw                      the perplexity on a text as well

Any model of the Llama architecture: rotary embeddings, grouped queries, a decoding state in the model's own cache, so
that `generate()` costs the same time and memory a token however long the past. In your own code:

    swap(model, "hedgehog")       in place; the maps are the only new parameters, and start as the identity
    model.generate(...)           as before
    swap_back(model)              the softmax model, to the bit

--data holds SAMSum's files, train, val(idation) and test, as CSV or JSON. Letters are those of hedgehog.py; besides
them K is the number of key-value heads, each of which serves G = H / K query heads.
"""

import csv
import inspect
import io
import json
import math
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.nn as nn
import torch.nn.functional as F
from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "experiments")]  # neither is an installed package
from convert_gpt2 import imitation_loss, maps_of  # noqa: E402
from hedgehog import FeatureMap, divide, linear_attention  # noqa: E402
from train_gpt import (  # noqa: E402
    cli, learning_rate, opt, parse_config, peak_gib, perplexity, pick_device, provenance, reset_peak, save_json,
    write_atomically)

try:
    import peft
    import transformers
    from rouge_score.rouge_scorer import RougeScorer
    from transformers.cache_utils import CacheLayerMixin, DynamicLayer
    from transformers.models.llama.modeling_llama import LlamaAttention, apply_rotary_pos_emb
except ImportError as e:
    print(f"convert_llama.py: error: {e}: pip install -r requirements-experiments.txt", file=sys.stderr)
    raise SystemExit(2) from None

KINDS = ("softmax", "hedgehog", "hedgehog_exp", "t2r", "elu", "relu")
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj")
PAPER = {"zero-shot": 19.3, "softmax": 51.1, "hedgehog": 47.4, "t2r": 2.8}  # ROUGE-1 of Llama-2 7B
ASK = "Summarize this dialogue in one or two sentences."
TEXT_BLOCK = 1024  # tokens of --text that are read at once
KL_ROWS = 32  # test dialogues on which the maps are compared with softmax
SPEED_TOKENS = 32


@dataclass
class LlamaConfig:
    model: str = opt("HuggingFaceTB/SmolLM2-135M-Instruct", "a Llama of transformers: folder, .gguf file or hub name")
    data: str = opt("data/samsum", "folder of SAMSum's train, val(idation) and test as CSV or JSON")
    attentions: tuple = opt(("softmax", "hedgehog", "t2r"), "rows of the table, besides the model as it came", KINDS)
    out: str = opt("experiments/results/llama.json", "the rows; those that are there already are not made again")
    save: str = opt("", "also write the maps and the LoRA weights, a folder a row in this one")
    text: str = opt("", "a text file, for the perplexity of the converted language model")
    text_tokens: int = opt(0, "read only so many tokens of --text; 0: all")
    # the data
    max_length: int = opt(1024, "tokens of prompt and summary; longer dialogues are cut at the end")
    max_new_tokens: int = opt(100, "longest summary that is generated")
    limit: int = opt(0, "train on only so many dialogues; 0: all")
    test_limit: int = opt(0, "test on only so many dialogues; 0: all")
    # stage 1: the maps alone learn to imitate softmax's weights
    distill_epochs: float = opt(2.0, "passes over the training dialogues; 0: no distillation")
    distill_lr: float = opt(1e-2, "peak learning rate of the maps")
    distill_text: str = opt("", "a text file that is read in each of these epochs besides the dialogues")
    # stage 2: low-rank updates of the attention's projections learn to write summaries
    lora_epochs: float = opt(2.0, "passes over the training dialogues; 0: no finetuning")
    lora_lr: float = opt(1e-4, "peak learning rate of the low-rank updates")
    map_lr: float = opt(0.0, "learning rate of the maps in stage 2; 0: they stay as distilled")
    rank: int = opt(8, "of the updates")
    alpha: float = opt(16.0, "the updates count alpha / rank times")
    # both
    batch_size: int = opt(8, "dialogues a step")
    warmup: float = opt(0.05, "part of the steps in which the learning rate rises; a cosine to a tenth follows")
    clip: float = opt(1.0, "largest norm of the gradient; in stage 1 of each layer's")
    gradient_checkpointing: bool = opt(False, "stage 2 computes each layer twice and keeps less: for large models")
    seed: int = opt(0, "of the order of the dialogues and the first low-rank weights")
    # machine
    device: str = opt("auto", "where to run", ("auto", "cuda", "mps", "cpu"))
    dtype: str = opt("auto", "of the model's weights; maps, states and low-rank weights are float32 always",
                     ("auto", "float32", "bfloat16"))
    generate_batch: int = opt(128, "summaries that are written at once")
    generate_lengths: tuple = opt((1024, 4096, 16384), "measure the speed of generation after so many tokens; 0: don't")
    speed_batch: int = opt(8, "sequences of that measurement")

    def __post_init__(self):
        for name in ("max_length", "max_new_tokens", "rank", "batch_size", "generate_batch", "speed_batch"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name.replace('_', '-')} must be at least 1, got {getattr(self, name)}")
        for name in ("distill_epochs", "lora_epochs", "distill_lr", "lora_lr", "map_lr", "limit", "test_limit",
                     "text_tokens", "alpha"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"--{name.replace('_', '-')} must be at least 0, got {getattr(self, name)}")
        if not 0 <= self.warmup <= 1 or not self.clip > 0 or min(self.generate_lengths) < 0:
            raise ValueError("--warmup must be in [0, 1], --clip above 0 and --generate-lengths at least 0, got "
                             f"{self.warmup}, {self.clip} and {self.generate_lengths}")


MACHINE = {"attentions", "out", "save", "device", "generate_batch", "gradient_checkpointing"}  # not what is computed


# ---------------------------------------------------------------------------------------------------------------------
# Linear attention in place of LlamaAttention


class StateLayer(CacheLayerMixin):
    """One layer's past in a cache of transformers: (B, K, P, D+1), however long it is."""

    is_sliding = is_compileable = is_croppable = False

    def __init__(self):
        super().__init__()
        self.state, self.length, self.is_initialized = None, 0, True

    def lazy_initialization(self, *args, **kwargs):
        """Nothing to do: the first tokens make the state."""

    def update(self, *args, **kwargs):
        raise ValueError("this cache holds the state of linear attention, which softmax cannot continue: start with an "
                         "empty cache after swap_back")

    def get_seq_length(self):
        return self.length

    def get_mask_sizes(self, query_length):
        return self.length + query_length, 0

    def get_max_length(self):
        return -1

    def reset(self):
        self.state, self.length = None, 0

    def offload(self):
        """It is small and stays."""

    prefetch = offload

    def crop(self, *args):
        raise ValueError("the state of linear attention cannot forget its last tokens: assisted generation and prompt "
                         "lookup need softmax")

    def reorder_cache(self, beam_idx):
        self.state = self.state.index_select(0, beam_idx.to(self.state.device))

    batch_select_indices = reorder_cache

    def batch_repeat_interleave(self, repeats):
        self.state = self.state.repeat_interleave(repeats, dim=0)


def state_layer(cache, index):
    """The StateLayer of a cache; takes the place of the empty layer for keys that generate() made there."""
    while len(cache.layers) <= index:
        cache.layers.append(StateLayer())
    layer = cache.layers[index]
    if not isinstance(layer, StateLayer):
        if type(layer) is not DynamicLayer:
            raise ValueError(f"linear attention keeps its state in the default cache (DynamicCache), not in one of "
                             f"{type(layer).__name__}: leave out cache_implementation")
        if layer.get_seq_length():
            raise ValueError("this cache holds keys of softmax attention, which linear attention cannot continue: "
                             "start with an empty one after swap")
        layer = cache.layers[index] = StateLayer()
    return layer


def visible_keys(mask, position_ids, T, past, check=True):
    """(B, T) bool: which of the T new keys count, from what transformers hands to a layer. None: all of them.

    The mask is None, (B, S) of flash attention, or (B, 1, T, S), bool (sdpa) or 0 and -inf (eager), S = past + T. The
    last query sees every key but padding, so its row tells the padding; what else a mask may hold is refused. `check`
    compares all of it: O(T S), as much as it took to make the mask. Keys of the past count as they did when they came.
    """
    if mask is None:
        # The rotation takes care of positions; it is a restart amid a row that would be a second sequence.
        if check and T > 1 and position_ids is not None and (position_ids.diff(dim=-1) != 1).any():
            raise ValueError("position_ids start again within a row: packed sequences need a state for each, which is "
                             "not supported; pad them instead")
        return None
    if not isinstance(mask, torch.Tensor):
        raise ValueError(f"masks of flex_attention ({type(mask).__name__}) cannot be read: load the model with "
                         "attn_implementation='sdpa'")
    if mask.shape[-1] != past + T:
        raise ValueError(f"the mask is for {mask.shape[-1]} keys, {past + T} have been seen: prefix tuning and static "
                         "caches are not supported")
    if mask.ndim == 2:
        return mask[:, -T:].bool()
    if mask.ndim != 4 or mask.shape[1] != 1:
        raise ValueError(f"a mask of shape {tuple(mask.shape)} is not one for all heads: linear attention can honour "
                         "only padding")
    seen = mask[:, 0] if mask.dtype == torch.bool else mask[:, 0] == 0                    # (B, T, S)
    keys = seen[:, -1]                                                                    # (B, S)
    if check and T > 1:
        if mask.is_floating_point() and ((mask != 0) & (mask > -1e4)).any():
            raise ValueError("the mask adds a bias to the scores (ALiBi or the like): linear attention has no scores "
                             "to add it to")
        causal = torch.ones_like(seen[0]).tril(past)
        if (seen & ~causal).any():
            raise ValueError("the mask lets a query see what comes after it (a prefix or bidirectional mask): this "
                             "linear attention is causal")
        if (seen != causal & keys.unsqueeze(1)).any():
            raise ValueError("the mask hides earlier keys from later queries (a sliding window, packed sequences or "
                             "a custom mask): a state cannot forget, only padding can be honoured")
    return keys[:, -T:]


class HedgehogLlamaAttention(nn.Module):
    """Takes the place of a LlamaAttention: its projections and its rotation, then feature maps and linear attention.

    A map for each of the H query heads and for each of the K key-value heads: as many keys as softmax has, so that the
    state is (B, K, P, D+1), G times smaller than with the keys repeated. (LoLCATs repeats first: H maps for keys.)
    Projections keep their names, so that LoRA finds them. Rotated features depend on where a token stands, and not
    only on how far it is from others, so positions must count from the first token that is not padding: see `swap`.
    """

    def __init__(self, attention, kind="hedgehog", **map_options):
        super().__init__()
        config = attention.config
        H, K, D = config.num_attention_heads, config.num_key_value_heads, attention.head_dim
        widths = tuple(getattr(attention, name).weight.shape[0] for name in PROJECTIONS[:2])
        if widths != (H * D, K * D) or H % K:
            raise ValueError(f"a head width that does not match: {H} query and {K} key-value heads of width {D} are "
                             f"not the {widths[0]} and {widths[1]} outputs of q_proj and k_proj")
        self.config, self.layer_idx, self.head_dim, self.n_group = config, attention.layer_idx, D, H // K
        for name in PROJECTIONS:
            setattr(self, name, getattr(attention, name))
        self.swapped_out = (attention,)  # in a tuple: its parameters are not registered a second time
        weight = self.q_proj.weight
        dtype = torch.promote_types(weight.dtype, torch.float32)
        self.map_q = FeatureMap(H, D, kind, **map_options).to(weight.device, dtype)
        self.map_k = FeatureMap(K, D, kind, **map_options).to(weight.device, dtype)

    def original(self):
        """The attention that was swapped out, with the projections that are here now."""
        attention, = self.swapped_out
        for name in PROJECTIONS:
            setattr(attention, name, getattr(self, name))
        return attention

    def rotated(self, hidden_states, position_embeddings):
        """q (B, H, T, D), k and v (B, K, T, D), as softmax would get them."""
        q, k, v = (getattr(self, name)(hidden_states).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
                   for name in PROJECTIONS[:3])
        return *apply_rotary_pos_emb(q, k, *position_embeddings), v

    def forward(self, hidden_states, position_embeddings, attention_mask=None, past_key_values=None, cache=None,
                position_ids=None, **kwargs):
        """hidden_states (B, T, C) -> (B, T, C), None. `cache` and `past_key_values`: the same, by version."""
        if kwargs.get("cu_seq_lens_q") is not None:
            raise ValueError("cu_seq_lens_q: packed sequences need a state for each, which is not supported")
        cache = past_key_values if cache is None else cache
        layer = state_layer(cache, self.layer_idx) if cache is not None else SimpleNamespace(state=None, length=0)
        q, k, v = self.rotated(hidden_states, position_embeddings)
        T = q.shape[2]
        keys = visible_keys(attention_mask, position_ids, T, layer.length, check=self.layer_idx == 0)
        phi_q, phi_k = self.map_q(q, is_query=True), self.map_k(k)                        # (B, H or K, T, P)
        if keys is not None:
            phi_k = phi_k.masked_fill(~keys[:, None, :, None], 0)                         # counts as no key
        y, layer.state = grouped_attention(phi_q, phi_k, v.to(phi_k.dtype), layer.state)
        layer.length += T
        return self.o_proj(y.to(v.dtype).transpose(1, 2).flatten(2)), None


def grouped_attention(q, k, v, state=None, eps=1e-30):
    """`linear_attention` for q (B, H, T, P), k (B, K, T, P), v (B, K, T, D), H = G K. -> y (B, H, T, D), state.

    The state is (B, K, P, D+1): query heads of a group read the same one. A single token is one outer product added to
    it and one product with the G queries; more of them are `linear_attention` with the keys repeated.
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


def swap(model, kind="hedgehog", **map_options):
    """Linear attention in every layer of a Llama of transformers, in place. Returns the model; `swap_back` undoes it.

    kind and map_options as in hedgehog.FeatureMap. Positions that are not given are counted from the first token that
    is not padding, also where transformers would count the padding on the left: softmax does not care, maps do.
    Raises ValueError for another architecture, or a model that is swapped already.
    """
    layers = getattr(getattr(model, "model", None), "layers", [])
    if not layers or not all(isinstance(layer.self_attn, LlamaAttention) for layer in layers):
        if any(isinstance(getattr(layer, "self_attn", None), HedgehogLlamaAttention) for layer in layers):
            raise ValueError("this model has linear attention already: swap_back(model) first")
        raise ValueError(f"{type(model).__name__} is not of the Llama architecture; supported is LlamaForCausalLM of "
                         "transformers (model_type 'llama': Llama 1 to 3, SmolLM2, TinyLlama, Vicuna ...)")
    for layer in layers:
        layer.self_attn = HedgehogLlamaAttention(layer.self_attn, kind, **map_options)
    model.model.position_hook = model.model.register_forward_pre_hook(count_positions, with_kwargs=True)
    return model


def swap_back(model):
    """The softmax attention again, with the projections as they are now. Returns the model."""
    for layer in model.model.layers:
        if isinstance(layer.self_attn, HedgehogLlamaAttention):
            layer.self_attn = layer.self_attn.original()
    if hasattr(model.model, "position_hook"):
        model.model.position_hook.remove()
        del model.model.position_hook
    return model


def count_positions(module, args, kwargs):
    """Before LlamaModel.forward: position_ids from a (B, S) attention_mask, unless they are given."""
    kwargs = dict(zip(inspect.signature(module.forward).parameters, args)) | kwargs
    mask = kwargs.get("attention_mask")
    if kwargs.get("position_ids") is None and isinstance(mask, torch.Tensor) and mask.ndim == 2:
        T = next(kwargs[name] for name in ("input_ids", "inputs_embeds") if kwargs.get(name) is not None).shape[1]
        kwargs["position_ids"] = (mask.long().cumsum(-1) - 1).clamp(min=0)[:, -T:]
    return (), kwargs


def load_maps(model, path):
    """Into a swapped model, the maps that --save wrote."""
    maps, given = maps_of(model), torch.load(path, map_location="cpu", weights_only=True)
    if {name: p.shape for name, p in given.items()} != {name: p.shape for name, p in maps.items()}:
        shapes = [tuple(next(iter(x.values())).shape) if x else None for x in (given, maps)]
        raise ValueError(f"{path} holds the maps of another model (heads, head width, head width: {shapes[0]}, here "
                         f"{shapes[1]}): give those of this model and this kind of map")
    model.load_state_dict(given, strict=False)


# ---------------------------------------------------------------------------------------------------------------------
# SAMSum


def read_samsum(folder):
    """{"train", "validation", "test": rows of id, dialogue and summary} from CSV, JSON or JSON-lines files."""
    folder, splits = Path(folder), {}
    if not folder.is_dir():
        raise ValueError(f"no folder {folder}: put SAMSum's train, val and test there, as CSV or JSON with the columns "
                         "id, dialogue and summary, and name it with --data")
    for split, names in dict(train=["train"], validation=["validation", "val", "valid", "dev"], test=["test"]).items():
        found = [p for name in names for end in ("csv", "json", "jsonl") if (p := folder / f"{name}.{end}").exists()]
        if found:
            splits[split] = read_rows(found[0])
    if "test" not in splits or len(splits) == 1:
        raise ValueError(f"{folder} must hold SAMSum's test split and train or val, as CSV or JSON; found "
                         f"{', '.join(splits) or 'neither'}")
    return splits


def read_rows(path):
    try:
        text = path.read_text(encoding="utf-8-sig")
        if path.suffix == ".csv":
            rows = list(csv.DictReader(io.StringIO(text, newline="")))
        elif text.lstrip().startswith("["):
            rows = json.loads(text)
        else:  # an object a line
            rows = [json.loads(line) for line in text.split("\n") if line.strip()]
        rows = [{name: str(row[name]).replace("\r\n", "\n").strip() for name in ("id", "dialogue", "summary")}
                for row in rows]
    except (ValueError, LookupError, TypeError, csv.Error) as e:
        raise ValueError(f"{path} is damaged, or lacks one of the columns id, dialogue and summary ({e!r})") from None
    rows = [row for row in rows if row["dialogue"] and row["summary"]]                    # one of SAMSum's is empty
    if not rows:
        raise ValueError(f"{path} holds no dialogue with a summary")
    return rows


def prompt_ids(tokenizer, dialogue):
    """The tokens that ask for a summary: in the model's own chat template, or plainly if it has none."""
    if getattr(tokenizer, "chat_template", None):
        turn = [dict(role="user", content=f"{ASK}\n\n{dialogue}")]
        text = tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True)
        return tokenizer(text, add_special_tokens=False).input_ids
    return tokenizer(f"{ASK}\n\n{dialogue}\n\nSummary:").input_ids


def encode(tokenizer, row, max_length, with_summary=True):
    """{"ids", "n_prompt", "cut"}: prompt and summary, of which the latter is learned. A long dialogue loses its end."""
    answer = []
    if with_summary:
        space = "" if getattr(tokenizer, "chat_template", None) else " "
        answer = tokenizer(space + row["summary"], add_special_tokens=False).input_ids + [tokenizer.eos_token_id]
    dialogue = row["dialogue"]
    prompt, cut = prompt_ids(tokenizer, dialogue), False
    while (excess := len(prompt) + len(answer) - max_length) > 0:
        words, cut = tokenizer(dialogue, add_special_tokens=False).input_ids, True
        if not words:
            raise ValueError(f"--max-length {max_length} is too short: a prompt without any dialogue and its summary "
                             f"take {len(prompt) + len(answer)} tokens")
        dialogue = tokenizer.decode(words[:max(0, len(words) - excess)])
        prompt = prompt_ids(tokenizer, dialogue)
    return dict(ids=prompt + answer, n_prompt=len(prompt), cut=cut)


def pad(sequences, left, device, fill=0):
    """Lists of tokens -> ids and mask (B, T), padded on the left to generate after them, else on the right."""
    T = max(map(len, sequences))
    ids = torch.full((len(sequences), T), fill)
    mask = torch.zeros_like(ids)
    for i, tokens in enumerate(sequences):
        where = slice(T - len(tokens), T) if left else slice(len(tokens))
        ids[i, where], mask[i, where] = torch.tensor(tokens), 1
    return ids.to(device), mask.to(device)


def read_text(path, tokenizer, limit=0):
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as e:
        raise ValueError(f"cannot read the text {path} ({e}): give a text file in UTF-8") from None
    ids = tokenizer(text, add_special_tokens=False, verbose=False).input_ids[:limit or None]
    if len(ids) < 2:
        raise ValueError(f"{path} holds {len(ids)} tokens: a perplexity takes at least 2")
    return ids


# ---------------------------------------------------------------------------------------------------------------------
# Two stages of training


def fit(groups, n_rows, epochs, config, device, label, step_loss):
    """AdamW on `groups`, [(parameters, learning rate)], each clipped on its own. step_loss(row indices) -> loss, after
    it has gone backward. Returns seconds."""
    per_epoch = math.ceil(n_rows / config.batch_size)
    schedule = SimpleNamespace(lr=1.0, steps=round(epochs * per_epoch))
    schedule.warmup = round(config.warmup * schedule.steps)
    optimizer = torch.optim.AdamW([dict(params=params, lr=lr, peak=lr) for params, lr in groups], weight_decay=0.0,
                                  betas=(0.9, 0.999), fused=device.type == "cuda")
    generator, order, began = torch.Generator().manual_seed(config.seed), [], time.perf_counter()
    with tqdm(total=schedule.steps, desc=label, unit="step", disable=None) as bar:
        for step in range(schedule.steps):
            if not order:
                order = list(torch.randperm(n_rows, generator=generator).split(config.batch_size))
            for group in optimizer.param_groups:
                group["lr"] = group["peak"] * learning_rate(step, schedule)
            loss = step_loss(order.pop(0).tolist())
            for params, _ in groups:
                torch.nn.utils.clip_grad_norm_(params, config.clip)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            if step % 10 == 0 or step == schedule.steps - 1:                              # reading it waits for a GPU
                if not math.isfinite(loss.item()):
                    raise ValueError(f"{label}: the loss is {loss.item()} at step {step}: lower --distill-lr or "
                                     "--lora-lr")
                bar.set_postfix(loss=f"{loss.item():.3f}")
            bar.update()
    return time.perf_counter() - began


class Imitation(nn.Module):
    """Stands in for a HedgehogLlamaAttention in stage 1: compares its maps with softmax, whose output it passes on.

    What a layer reads depends on no map, so its loss goes backward at once: memory is that of one layer.
    """

    def __init__(self, student, real, learn):
        super().__init__()
        self.student, self.real, self.learn, self.losses = student, real, learn, None

    def forward(self, hidden_states, position_embeddings, **kwargs):
        q, k, _ = self.student.rotated(hidden_states, position_embeddings)
        with torch.set_grad_enabled(self.learn):
            phi_q, phi_k = self.student.map_q(q, is_query=True), self.student.map_k(k)
            k, phi_k = (x.repeat_interleave(self.student.n_group, dim=1) for x in (k, phi_k))
            both = imitation_loss(q, k, phi_q, phi_k, real=self.real)
        if self.learn:
            both[0].backward()
        self.losses = torch.stack([value.detach() for value in both])
        return self.student.original()(hidden_states, position_embeddings, **kwargs)


@torch.no_grad()
def imitate(model, ids, mask, learn=False):
    """The teacher reads ids (B, T), and each layer's maps are compared with its weights: (layers, 2), cross-entropy and
    entropy. With `learn`, each layer's cross-entropy has gone backward into its maps."""
    layers, students = model.model.layers, [layer.self_attn for layer in model.model.layers]
    try:
        for layer, student in zip(layers, students):
            layer.self_attn = Imitation(student, mask.bool(), learn)
        model.model(input_ids=ids, attention_mask=mask, use_cache=False)
        return torch.stack([layer.self_attn.losses for layer in layers])
    finally:
        for layer, student in zip(layers, students):
            layer.self_attn = student


def distill(model, examples, config, device):
    """Train the maps of a swapped model, in place. Returns seconds."""
    model.eval().requires_grad_(False)
    maps = [[p for m in (x.self_attn.map_q, x.self_attn.map_k) for p in m.parameters()] for x in model.model.layers]
    for p in sum(maps, []):
        p.requires_grad_(True)

    def step_loss(rows):
        ids, mask = pad([examples[i]["ids"] for i in rows], False, device)
        return imitate(model, ids, mask, learn=True)[:, 0].mean()

    groups = [(params, config.distill_lr) for params in maps]  # layers are problems of their own, also in clipping
    return fit(groups, len(examples), config.distill_epochs, config, device, "distilling", step_loss)


def divergence(model, examples, config, device):
    """KL of each layer's linear weights from softmax's, in nats a query: the mean over queries and heads."""
    total, weights = 0, 0
    for batch in (examples[i:i + config.batch_size] for i in range(0, len(examples), config.batch_size)):
        ids, mask = pad([x["ids"] for x in batch], False, device)
        cross_entropy, entropy = imitate(model, ids, mask).double().cpu().T
        total, weights = total + (cross_entropy - entropy) * mask.sum().item(), weights + mask.sum().item()
    return (total / weights).tolist()


def add_lora(model, config):
    """A peft model around `model`, in which low-rank updates of q, k, v and o are all that learns."""
    torch.manual_seed(config.seed)
    return peft.get_peft_model(model, peft.LoraConfig(r=config.rank, lora_alpha=config.alpha, task_type="CAUSAL_LM",
                                                      target_modules=list(PROJECTIONS)))


def summary_loss(model, examples, device):
    """Mean cross-entropy of the summaries' tokens and their end; logits are formed for no others."""
    ids, mask = pad([x["ids"] for x in examples], False, device)
    x = model.model(input_ids=ids, attention_mask=mask, use_cache=False)[0]               # (B, T, C)
    n_prompt = torch.tensor([[x["n_prompt"]] for x in examples], device=device)
    learned = ((torch.arange(ids.shape[1], device=device) >= n_prompt) & mask.bool())[:, 1:]
    return F.cross_entropy(model.lm_head(x[:, :-1][learned]).float(), ids[:, 1:][learned])


def finetune(model, examples, config, device):
    """Train the LoRA weights in `model`, a LlamaForCausalLM, on the summaries' tokens. Returns seconds."""
    maps = list(maps_of(model).values()) if config.map_lr else []
    for p in maps:
        p.requires_grad_(True)
    lora = [p for name, p in model.named_parameters() if "lora_" in name]
    if config.gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=dict(use_reentrant=False))
    model.train(config.gradient_checkpointing)  # what switches it on; there is no dropout

    def step_loss(rows):
        loss = summary_loss(model, [examples[i] for i in rows], device)
        loss.backward()
        return loss.detach()

    groups = [(lora, config.lora_lr)] + ([(maps, config.map_lr)] if maps else [])
    seconds = fit(groups, len(examples), config.lora_epochs, config, device, "LoRA", step_loss)
    model.eval()
    return seconds


# ---------------------------------------------------------------------------------------------------------------------
# What is measured


@torch.no_grad()
def summarize(model, tokenizer, examples, config, device):
    """The likeliest summary of each prompt, token by token. Prompts of one length are written together."""
    fill, texts = tokenizer.eos_token_id, [""] * len(examples)
    order = sorted(range(len(examples)), key=lambda i: -len(examples[i]["ids"]))
    with tqdm(total=len(order), desc="writing", unit="summary", disable=None) as bar:
        for batch in (order[i:i + config.generate_batch] for i in range(0, len(order), config.generate_batch)):
            ids, mask = pad([examples[i]["ids"] for i in batch], True, device, fill)
            written = model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=config.max_new_tokens,
                                     do_sample=False, eos_token_id=fill, pad_token_id=fill)[:, ids.shape[1]:]
            for i, tokens in zip(batch, written.tolist()):
                texts[i] = tokenizer.decode(tokens, skip_special_tokens=True).strip()
            bar.update(len(batch))
    return texts


def rouge(references, summaries):
    """{"rouge1", "rouge2", "rougeL"}: mean F1 in percent, words stemmed, as summaries of SAMSum are usually scored."""
    names = ("rouge1", "rouge2", "rougeL")
    scorer = RougeScorer(names, use_stemmer=True)
    scores = [scorer.score(reference, summary) for reference, summary in zip(references, summaries)]
    return {name: 100 * sum(score[name].fmeasure for score in scores) / len(scores) for name in names}


@torch.no_grad()
def text_perplexity(model, ids, batch_size, device):
    """Perplexity a token over the whole text, in blocks that do not overlap: each token has the past of its block."""
    ids, total = torch.tensor(ids), 0.0
    n_full = (len(ids) - 1) // TEXT_BLOCK * TEXT_BLOCK
    blocks = list(zip(ids[:n_full].view(-1, TEXT_BLOCK).split(batch_size),
                      ids[1:n_full + 1].view(-1, TEXT_BLOCK).split(batch_size))) if n_full else []
    rest = [(ids[None, n_full:-1], ids[None, n_full + 1:])] if n_full < len(ids) - 1 else []
    for x, y in tqdm(blocks + rest, desc="reading", unit="batch", disable=None):
        logits = model(input_ids=x.to(device), use_cache=False).logits.float()
        total += F.cross_entropy(logits.flatten(0, 1), y.flatten().to(device), reduction="sum").item()
    return perplexity(total / (len(ids) - 1))


class Clock(transformers.StoppingCriteria):
    """Notes when each token was there, and the memory from the second one on: what the past takes, not the prompt."""

    def __init__(self, device):
        self.device, self.times = device, []

    def __call__(self, input_ids, scores, **kwargs):
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        if not self.times:
            reset_peak(self.device)
        self.times.append(time.perf_counter())
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)


@torch.no_grad()
def speed(model, length, config, device):
    """(tokens a second, peak GiB on a GPU) of generation after `length` tokens, whatever they say. None: no memory."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(model.config.vocab_size, (config.speed_batch, length), generator=generator).to(device)
    clock = Clock(device)
    try:
        model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=SPEED_TOKENS, do_sample=False,
                       min_new_tokens=SPEED_TOKENS, pad_token_id=0, stopping_criteria=[clock])
    except torch.OutOfMemoryError:  # a result as well, and no reason to lose the row
        return None, None
    steps = torch.tensor(clock.times, dtype=torch.float64).diff()
    return config.speed_batch / steps.median().item(), peak_gib(device)


# ---------------------------------------------------------------------------------------------------------------------
# The table


def where_is(name):
    """Arguments for from_pretrained: a folder or hub name, or a GGUF file, which transformers dequantizes itself."""
    path = Path(name)
    if path.suffix != ".gguf":
        return (name,), {}
    if not path.exists():
        raise ValueError(f"no file {path}: mend --model")
    try:
        import gguf  # noqa: F401  (for transformers)
    except ImportError:
        raise ValueError("the package gguf is missing: pip install -r requirements-experiments.txt") from None
    return (str(path.parent),), dict(gguf_file=path.name)


def first_line(error):
    return str(error).strip().split("\n")[0]


def load(config, device, dtype):
    args, gguf_file = where_is(config.model)
    try:
        kind = transformers.AutoConfig.from_pretrained(*args, **gguf_file).model_type
        if kind == "llama":
            model = transformers.AutoModelForCausalLM.from_pretrained(*args, dtype=dtype or torch.float32, **gguf_file)
            return model.to(device).eval()
    except (OSError, KeyError) as e:
        raise ValueError(f"no model of transformers at {config.model} ({first_line(e)}): give a folder with "
                         "config.json, a .gguf file or a name on the hub") from None
    raise ValueError(f"{config.model} is a model of type {kind!r}; supported is 'llama' (LlamaForCausalLM of "
                     "transformers: Llama 1 to 3, SmolLM2, TinyLlama, Vicuna ...)")


def load_tokenizer(config):
    args, gguf_file = where_is(config.model)
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(*args, **gguf_file)
    except (OSError, ValueError) as e:
        raise ValueError(f"no tokenizer at {config.model} ({first_line(e)}): give a model with one") from None
    if tokenizer.eos_token_id is None:
        raise ValueError(f"the tokenizer of {config.model} has no end-of-text token, which ends a summary")
    return tokenizer


def earlier_rows(path, settings):
    """The rows of a run that was interrupted, or of one for other attentions."""
    if not path.exists():
        return []
    try:
        rows = json.loads(path.read_text())
        changed = sorted({name for row in rows for name in settings if row[name] != settings[name]})
        assert all(row["attention"] for row in rows)
    except (ValueError, TypeError, LookupError, AssertionError):
        raise ValueError(f"{path} is damaged, or not of this experiment: choose another --out") from None
    if changed:
        raise ValueError(f"{path} holds rows made with another "
                         f"{', '.join('--' + name.replace('_', '-') for name in changed)}: choose another --out")
    return rows


def measure_row(name, data, tokenizer, config, device, dtype):
    """Convert, finetune, summarize: the row of one attention."""
    model, row = load(config, device, dtype), dict(attention=name)
    reset_peak(device)
    if name not in ("zero-shot", "softmax"):
        swap(model, name)
        row["maps"] = sum(p.numel() for p in maps_of(model).values())
        row["kl_before"] = sum(divergence(model, data["kl"], config, device)) / len(model.model.layers)
        if config.distill_epochs and row["maps"]:
            row["distill_seconds"] = distill(model, data["distill"], config, device)
            row["kl_layers"] = divergence(model, data["kl"], config, device)
            row["kl"] = sum(row["kl_layers"]) / len(row["kl_layers"])
            tqdm.write(f"{name}: distilled, KL {row['kl_before']:.3f} -> {row['kl']:.3f} nats a query")
        row["distill_gib"] = peak_gib(device)
        if data["text"]:
            row["distilled_text_ppl"] = text_perplexity(model, data["text"], config.batch_size, device)
    if name != "zero-shot" and config.lora_epochs:
        reset_peak(device)
        lora = add_lora(model, config)
        row["lora_seconds"], row["lora_gib"] = finetune(model, data["train"], config, device), peak_gib(device)
        if config.save:
            lora.save_pretrained(Path(config.save) / name)
        model = lora.merge_and_unload()
    if config.save and maps_of(model):
        folder = Path(config.save) / name
        folder.mkdir(parents=True, exist_ok=True)
        maps = {key: p.detach().cpu() for key, p in maps_of(model).items()}
        write_atomically(folder / "maps.pt", lambda f: torch.save(maps, f))
    if data["text"]:
        row["text_ppl"] = text_perplexity(model, data["text"], config.batch_size, device)
    began = time.perf_counter()
    summaries = summarize(model, tokenizer, data["test"], config, device)
    row["generate_seconds"] = time.perf_counter() - began
    row |= rouge([x["summary"] for x in data["test_rows"]], summaries)
    row["samples"] = {x["id"]: text for x, text in list(zip(data["test_rows"], summaries))[:3]}
    lengths = tqdm([n for n in config.generate_lengths if n], desc="speed", disable=None)
    measured = {str(n): speed(model, n, config, device) for n in lengths}
    row["tokens_per_second"] = {n: tokens for n, (tokens, _) in measured.items()}
    row["generate_gib"] = {n: gib for n, (_, gib) in measured.items()}
    return row


def prepare(config, tokenizer):
    """The rows of the table's data as tokens, and how they were chosen."""
    splits = read_samsum(config.data)
    trained_on = "train" if "train" in splits else "validation"
    rows = splits[trained_on][:config.limit or None]
    test = splits["test"][:config.test_limit or None]
    train = [encode(tokenizer, row, config.max_length) for row in tqdm(rows, desc="tokens", disable=None)]
    data = dict(train=train, test_rows=test, test=[encode(tokenizer, row, config.max_length, False) for row in test])
    data["kl"] = [encode(tokenizer, row, config.max_length) for row in test[:KL_ROWS]]
    data["text"] = read_text(config.text, tokenizer, config.text_tokens) if config.text else None
    extra = read_text(config.distill_text, tokenizer) if config.distill_text else []
    data["distill"] = train + [dict(ids=extra[i:i + config.max_length])
                               for i in range(0, len(extra) - 1, config.max_length)]
    about = dict(trained_on=trained_on, train_rows=len(train), test_rows=len(test),
                 cut=sum(x["cut"] for x in train + data["test"]))
    return data, about


def main(config):
    device, dtype, why = pick_device(config.device, config.dtype)
    settings = json.loads(json.dumps({k: v for k, v in asdict(config).items() if k not in MACHINE}))
    rows = earlier_rows(Path(config.out), settings)
    transformers.utils.logging.disable_progress_bar()  # of the loading, which takes seconds
    tokenizer = load_tokenizer(config)
    data, about = prepare(config, tokenizer)
    Path(config.out).parent.mkdir(parents=True, exist_ok=True)
    tqdm.write(f"{config.model} on {why}\ntrained on {about['train_rows']} dialogues of SAMSum's {about['trained_on']} "
               f"split, tested on {about['test_rows']} of test; {about['cut']} cut at {config.max_length} tokens")
    for name in ("zero-shot", *config.attentions):
        if any(row["attention"] == name for row in rows):
            continue
        row = measure_row(name, data, tokenizer, config, device, dtype)
        rows.append(row | about | settings | dict(weights=str(dtype or torch.float32)) | provenance(device))
        save_json(Path(config.out), rows)                                                 # a stopped run keeps its rows
        tqdm.write(f"{name}: ROUGE-1 {row['rouge1']:.1f}")
    print(table(rows), samples(rows, data["test_rows"]), sep="\n\n")


def table(rows):
    """R1 / softmax: of the row's ROUGE-1 to that of softmax + LoRA; the paper's is 47.4 / 51.1 = 0.93."""
    lengths = list(dict.fromkeys(n for row in rows for n in row["tokens_per_second"]))
    form = "{:16}{:>8}{:>8}{:>8}{:>13}{:>10}{:>10}{:>10}".format
    lines = [form("", "R1", "R2", "RL", "R1 / softmax", "paper's", "text ppl", "seconds")
             + "".join(f"{f'tok/s@{n}':>14}" for n in lengths)]
    best = next((row["rouge1"] for row in rows if row["attention"] == "softmax"), 0) or math.nan
    for row in rows:
        paper, ppl = PAPER.get(row["attention"]), row.get("text_ppl")
        seconds = sum(row.get(f"{stage}_seconds", 0) for stage in ("distill", "lora", "generate"))
        lines.append(form(row["attention"] + " + LoRA" * ("lora_seconds" in row),
                          *(f"{row[name]:.1f}" for name in ("rouge1", "rouge2", "rougeL")),
                          f"{row['rouge1'] / best:.3f}", f"{paper / PAPER['softmax']:.3f}" if paper else "-",
                          f"{ppl:.2f}" if ppl else "-", f"{seconds:.0f}")
                     + "".join(f"{row['tokens_per_second'].get(n) or math.nan:14.0f}" for n in lengths))
    return "\n".join(lines)


def samples(rows, test):
    """What each model wrote of the same dialogues, below what a person did."""
    lines = []
    for x in test[:len(rows[0]["samples"])]:
        lines += [f"dialogue {x['id']}", f"  {'a person':11}{x['summary']}"]
        lines += [f"  {row['attention']:11}{' '.join(row['samples'].get(x['id'], '').split())}" for row in rows]
    return "\n".join(lines)


if __name__ == "__main__":
    cli(lambda: main(parse_config(LlamaConfig)),
        out_of_memory="lower --batch-size, --generate-batch or --speed-batch, or add --gradient-checkpointing")
