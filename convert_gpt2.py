"""Turn a trained softmax GPT-2 into a Hedgehog GPT-2: distil its attention into feature maps, then finetune.

    python convert_gpt2.py                                 the tiny softmax model of train_gpt.py, trained if need be
    python convert_gpt2.py --attention t2r                 the same with another feature map
    python convert_gpt2.py --distill-steps 0               the same without distillation
    python convert_gpt2.py --preset gpt2                   GPT-2 124M on WikiText-103, the paper's experiment

The teacher is GPT-2 from the Hugging Face hub, a folder that holds its two files, or a run of train_gpt.py. All rows of
results go into summary.json of --out, and each conversion has a folder in it: distilled/ (the maps alone) and finetuned/,
which is a run of train_gpt.py, so that sample.py writes with it and train_gpt.py --resume goes on with it.
"""

import json
import math
import os
import re
import shutil
import time
import urllib.error
import urllib.request
from contextlib import nullcontext
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from tqdm import tqdm

from data.prepare import USER_AGENT, download, sha256
from hedgehog import ATTENTIONS, GPT, GPTConfig
from train_gpt import (
    HERE, MAY_CHANGE_ON_RESUME, Log, TrainConfig, cli, evaluate_splits, find_data, get_batch, interrupts, learning_rate,
    load_checkpoint, load_model, make_optimizer, move_aside, opt, parse_config, peak_gib, pick_device, provenance,
    refuse_changes, save_json, stop_if_not_finite, train, write_atomically)
from train_gpt import PRESETS as TRAIN_PRESETS

HUB = "https://huggingface.co/openai-community/{}/resolve/main/{}"
GPT2 = ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl")
MAY_CHANGE = MAY_CHANGE_ON_RESUME | {"name", "reference", "export"}
EVAL_BLOCKS = 32  # of the validation text, evenly spread, on which the maps are compared with softmax


@dataclass
class ConvertConfig:
    preset: str = opt("tiny", "named set of defaults; any flag overrides it", ("tiny", "gpt2"))
    teacher: str = opt("", f"{', '.join(GPT2)}; a folder with model.safetensors and config.json; a run or .pt file of "
                       "train_gpt.py. Default: runs/tiny-softmax, trained if it is not there")
    attention: str = opt("hedgehog", "the feature map; softmax: only finetune the teacher", ATTENTIONS)
    data: str = opt("", "folder made by data/prepare.py; default: data/pydoc, made on the fly")
    out: str = opt("", "folder of the results; default: runs/convert-PRESET")
    name: str = opt("", "of this conversion, its folder in --out; default: its --attention")
    resume: bool = opt(False, "go on with the conversion in --out; flags not given are taken from it")
    reference: bool = opt(True, "first finetune the teacher as well, unless --out has such a row")
    export: str = opt("", "also write the result there, as model.safetensors and config.json")
    # the new model
    block_size: int = opt(0, "context length in tokens; 0: the teacher's")
    feature_bias: bool = opt(False, "bias in the feature maps")
    tie_qk: bool = opt(False, "one feature map for queries and keys")
    map_scale: float = opt(1.0, "feature maps start from this times the identity")
    temperature: float = opt(1.0, "of the exp map: exp(temperature x)")
    chunk_size: int = opt(64, "tokens whose attention weights are formed at once")
    segment_size: int = opt(256, "tokens whose features are held at once while finetuning; 0: all, more memory")
    dropout: float = opt(0.0, "while finetuning")
    # stage 1: the maps alone learn to imitate softmax's weights
    maps: str = opt("", "start from the maps of this checkpoint: a distilled/last.pt, or any of a model like this one")
    distill_steps: int = opt(400, "optimizer steps of stage 1; 0: no distillation")
    distill_batch_size: int = opt(8, "sequences a step of stage 1")
    distill_lr: float = opt(1e-2, "peak learning rate of stage 1")
    # stage 2: the language-modelling loss, as in train_gpt.py
    steps: int = opt(300, "optimizer steps of stage 2; 0: no finetuning")
    batch_size: int = opt(8, "sequences a step of stage 2")
    accum: int = opt(1, "micro-batches a step of stage 2; doubling it halves the memory, not the batch")
    lr: float = opt(6e-4, "peak learning rate of stage 2")
    map_lr_scale: float = opt(1.0, "learning rate of the feature maps in stage 2, times --lr")
    weight_decay: float = opt(0.1, "on matrices, in stage 2")
    lora_rank: int = opt(0, "train low-rank updates of the attention's projections and nothing else; 0: all weights")
    # both
    warmup: float = opt(0.05, "part of the steps of each stage in which the learning rate rises")
    beta2: float = opt(0.999, "AdamW's second moment")
    clip: float = opt(1.0, "largest norm of the gradient; in stage 1 of each layer's")
    seed: int = opt(0, "of the order of the data and dropout")
    device: str = opt("auto", "where to run", ("auto", "cuda", "mps", "cpu"))
    dtype: str = opt("auto", "of the matrix products; maps and stage 1's loss are float32 always",
                     ("auto", "float32", "bfloat16"))
    compile: bool = opt(False, "torch.compile: a minute more at the start, much faster on a GPU")
    eval_every: int = opt(100, "steps between evaluations, each of which also writes a checkpoint")
    prompt: str = opt("The ", "beginning of the sample at the end")

    def __post_init__(self):
        if not (self.distill_steps >= 0 and self.block_size >= 0 and 0 <= self.warmup <= 1):
            raise ValueError(f"--distill-steps {self.distill_steps} and --block-size {self.block_size} must be at least "
                             f"0 and --warmup {self.warmup} in [0, 1]")
        if self.batch_size % max(1, self.accum):
            raise ValueError(f"--batch-size {self.batch_size} must be a multiple of --accum {self.accum}")


PRESETS = {
    "tiny": {},
    # Distil 2 epochs of 118M tokens, 8 x 1,024 a step, then train all weights at 6e-4: the paper. Its batch and length
    # of the second stage are not known to us: one epoch of the same batch here.
    "gpt2": dict(teacher="gpt2", data="data/wikitext103", distill_steps=2 * 14394, steps=14394, eval_every=1000,
                 chunk_size=128, segment_size=0, compile=True),
}


def table_folder(config):
    return Path(config.out or f"runs/convert-{config.preset}")


def run_name(config):
    undistilled = config.attention != "softmax" and not config.distill_steps and not config.maps
    return config.name or config.attention + ("-undistilled" if undistilled else "")


def saved_config(config):
    path = table_folder(config) / run_name(config) / "config.json"
    try:
        saved = json.loads(path.read_text())
        return {f.name: saved[f.name] for f in fields(ConvertConfig)}
    except FileNotFoundError:
        raise ValueError(f"no conversion at {path.parent}: leave out --resume, or mend --out, --name, --attention") from None
    except (ValueError, LookupError, TypeError):
        raise ValueError(f"{path} is damaged: leave out --resume to begin again") from None


# ---------------------------------------------------------------------------------------------------------------------
# The teacher


def load_teacher(config):
    """(a softmax GPT, the tokenizer it was trained with or None)."""
    name, path = config.teacher, Path(config.teacher or "runs/tiny-softmax")
    if name in GPT2:
        path = download_teacher(name)
    elif not name and not (path / "summary.json").exists():
        print(f"no teacher in {path}: training it first")
        flags = ["--attention", "softmax", "--out", str(path), "--device", config.device]
        train(parse_config(TrainConfig, TRAIN_PRESETS, flags + ["--resume"] * (path / "last.pt").exists()))
    if path.suffix == ".pt" or (path / "best.pt").exists():
        model, checkpoint = load_model(path if path.suffix == ".pt" else path / "best.pt")
        tokenizer = checkpoint["meta"]["tokenizer"]
    elif path.is_dir():
        model, tokenizer = load_gpt2(path), None
    else:
        raise ValueError(f"no teacher at {path}: give one of {', '.join(GPT2)}, a folder with model.safetensors and "
                         "config.json, or a softmax run of train_gpt.py")
    if model.config.attention != "softmax":
        raise ValueError(f"the teacher {path} is linear already ({model.config.attention}): give one with softmax")
    return model, tokenizer


def download_teacher(name):
    """The folder with GPT-2's two files, fetched from the Hugging Face hub at the first use."""
    folder = HERE / "data" / name
    folder.mkdir(parents=True, exist_ok=True)
    for file in ("config.json", "model.safetensors"):
        path, url = folder / file, HUB.format(name, file)
        if path.exists():
            continue
        expected = hub_sha256(url)
        download([url], path, lambda part: not expected or file_sha256(part) == expected,
                 f"get {url} elsewhere and put it at {path}")
        save_sha256(path)
    return folder


def hub_sha256(url):
    """The sha256 of a large file, which the hub sends with its redirection; None for a small file, or no network."""
    class Stay(urllib.request.HTTPRedirectHandler):
        def redirect_request(self, *_):
            return None
    try:
        request = urllib.request.Request(url, headers=USER_AGENT, method="HEAD")
        headers = urllib.request.build_opener(Stay).open(request, timeout=30).headers
    except urllib.error.HTTPError as e:  # the redirection, if nothing else
        headers = e.headers
    except OSError:
        return None
    tag = (headers["X-Linked-Etag"] or headers["ETag"] or "").strip('"')
    return tag if re.fullmatch("[0-9a-f]{64}", tag) else None


def file_sha256(path):
    with open(path, "rb") as f:
        return sha256(f)


def save_sha256(path):
    """Beside the file, as `sha256sum --check` reads it: what is changed later is noticed."""
    text = f"{file_sha256(path)}  {path.name}\n"
    write_atomically(path.with_name(path.name + ".sha256"), lambda f: f.write(text.encode()))


def load_gpt2(folder):
    """A GPT, softmax or linear, from a folder with model.safetensors and config.json: GPT-2's own, or of --export."""
    folder = Path(folder)
    config_path, path = folder / "config.json", folder / "model.safetensors"
    for needed in (config_path, path):
        if not needed.exists():
            raise ValueError(f"{folder} has no {needed.name}: a teacher's folder holds config.json and model.safetensors")
    model = GPT(gpt2_config(config_path)).eval()
    record = path.with_name(path.name + ".sha256")
    if record.exists() and record.read_text().split()[:1] != [file_sha256(path)]:
        raise ValueError(f"{path} is not the file that {record.name} beside it tells of: delete both and get it again")
    expected = dict([*model.named_parameters(), *model.named_buffers()])
    try:
        with safe_open(path, "pt") as f, torch.no_grad():
            # GPT2Model has no prefix and GPT2LMHeadModel has one; older files hold the causal mask as a buffer.
            stored = {n if n.startswith(("transformer.", "lm_head.")) else "transformer." + n: n for n in f.keys()
                      if not re.search(r"\.attn\.(masked_)?bias$", n)}
            shapes = {n: tuple(f.get_slice(s).get_shape()) for n, s in stored.items()}
            head = stored.pop("lm_head.weight", None) if model.config.tie_head else None
            wrong = [n for n, p in expected.items() if n in stored and conv1d(n, p).shape != shapes[n]]
            if expected.keys() != stored.keys() or wrong:
                raise ValueError(f"{path} does not fit its config.json: "
                                 f"missing: {some(expected.keys() - stored.keys())}; left over: "
                                 f"{some(stored.keys() - expected.keys())}; of another shape: {some(wrong)}")
            for name, p in expected.items():
                conv1d(name, p).copy_(f.get_tensor(stored[name]))
                if not p.isfinite().all():
                    raise ValueError(f"{path}: {name} holds values that are not finite: get the file again")
            if head and not torch.equal(f.get_tensor(head).float(), model.lm_head.weight):
                raise ValueError(f"{path} has an lm_head of its own, config.json says that it is tied: add "
                                 '"tie_word_embeddings": false to it')
    except SafetensorError as e:
        raise ValueError(f"{path} is truncated or no safetensors file ({e}): get it again") from e
    return model


def conv1d(name, p):
    """The weight as GPT-2 stores it: (in, out), which is a view of our (out, in)."""
    return p.mT if re.search(r"\.(c_attn|c_proj|c_fc)\.weight$", name) else p


def some(names):
    names = sorted(names)
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "") or "none"


def gpt2_config(path):
    try:
        given = json.loads(path.read_text())
        if "hedgehog" in given:
            return GPTConfig(**given["hedgehog"])
        # What our GPT has fixed: another value would load, and then compute something else.
        fixed = dict(model_type="gpt2", activation_function="gelu_new", layer_norm_epsilon=1e-5, n_inner=None,
                     scale_attn_weights=True, scale_attn_by_inverse_layer_idx=False, add_cross_attention=False)
        odd = [f"{k}={given[k]}" for k, v in fixed.items() if given.get(k, v) not in (v, 4 * given["n_embd"])]
        if odd:
            raise ValueError(f"{path} is not of a plain GPT-2 ({', '.join(odd)}): this architecture cannot be converted")
        return GPTConfig(block_size=given["n_positions"], tie_head=given.get("tie_word_embeddings", True),
                         attention="softmax", **{k: given[k] for k in ("vocab_size", "n_layer", "n_head", "n_embd")})
    except (json.JSONDecodeError, UnicodeDecodeError, LookupError, TypeError, AttributeError) as e:
        raise ValueError(f"{path} is damaged, or not GPT-2's ({type(e).__name__}: {e}): get it again") from e


def export(model, folder):
    """model.safetensors and config.json, in GPT-2's layout: load_gpt2 reads them, transformers too if it is softmax."""
    folder, c = Path(folder), model.config
    part = folder.with_name(folder.name + ".tmp")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    try:
        tensors = [*model.named_parameters(), *model.named_buffers()]
        save_file({n: conv1d(n, p.detach()).cpu().contiguous() for n, p in tensors}, part / "model.safetensors",
                  metadata={"format": "pt"})
        save_sha256(part / "model.safetensors")
        plain = c.attention == "softmax" and c.bias
        save_json(part / "config.json", dict(
            model_type="gpt2" if plain else "hedgehog_gpt2", architectures=["GPT2LMHeadModel" if plain else "GPT"],
            vocab_size=c.vocab_size, n_positions=c.block_size, n_layer=c.n_layer, n_head=c.n_head, n_embd=c.n_embd,
            activation_function="gelu_new", layer_norm_epsilon=1e-5, tie_word_embeddings=c.tie_head,
            hedgehog=asdict(c)))
        os.replace(part, folder)
    except (SafetensorError, OSError) as e:
        raise ValueError(f"could not write {folder} ({e}): free some space or choose another --export") from e
    finally:
        shutil.rmtree(part, ignore_errors=True)


def swap(teacher, config):
    """A GPT with the teacher's weights and linear attention: what is new in it is exactly the feature maps."""
    block_size, longest = config.block_size or teacher.config.block_size, teacher.config.block_size
    if block_size > longest:
        raise ValueError(f"--block-size {block_size}: the teacher knows {longest} positions, take at most that")
    options = {f.name: getattr(config, f.name) for f in fields(GPTConfig) if hasattr(config, f.name)}
    student = GPT(replace(teacher.config, **options | {"block_size": block_size}))
    weights = teacher.state_dict()
    weights["transformer.wpe.weight"] = weights["transformer.wpe.weight"][:block_size]
    new, left = student.load_state_dict(weights, strict=False)
    assert not left and all(".map_" in name for name in new)
    with torch.no_grad():
        for name, p in maps_of(student).items():
            if name.endswith("weight"):
                p.mul_(config.map_scale)
    if config.maps:
        load_maps(student, config.maps)
    return student


def maps_of(model):
    return {name: p for name, p in model.named_parameters() if ".map_" in name}


def load_maps(model, path):
    given, maps = load_checkpoint(path)["model"], maps_of(model)
    shapes = {name: p.shape for name, p in given.items() if name in maps}
    if shapes != {name: p.shape for name, p in maps.items()}:
        raise ValueError(f"{path} does not hold the feature maps of this model: --attention, --feature-bias, --tie-qk and "
                         "the teacher must be those it was made with")
    model.load_state_dict({name: given[name] for name in maps}, strict=False)


# ---------------------------------------------------------------------------------------------------------------------
# Stage 1: attention distillation


def imitation_loss(q, k, phi_q, phi_k, tiny=1e-37):
    """(cross-entropy of the linear weights under softmax's, entropy of softmax's), each the mean over all queries.

        L_i = - sum_{j<=i} p_ij log(a_ij / sum_{m<=i} a_im)      p = softmax(q.k / sqrt(D)), a = phi(q).phi(k)

    q, k (B, H, T, D), phi_q, phi_k (B, H, T, P). Source: the paper's equation; LoLCATs' code. The entropy is its floor.
    Each a_ij is bounded from below inside the sum as well as above it, so that a / sum(a) is a distribution whatever
    the maps do. With an addend outside, log(a + eps) - log(sum(a) + eps), a row of n keys sums to n as a -> 0: the loss
    falls below the entropy and whole heads collapse. The bound lies below all that attention sees (its own is 1e-30).
    """
    with torch.autocast(q.device.type, enabled=False):
        q, k = q.to(phi_q.dtype), k.to(phi_k.dtype)
        future = torch.ones(q.shape[2], q.shape[2], dtype=torch.bool, device=q.device).triu(1)
        s = q @ k.mT / math.sqrt(q.shape[-1])                                             # (B, H, T, T), as all below
        log_sum = s.masked_fill(future, -math.inf).logsumexp(-1, keepdim=True)
        p = (s - log_sum).exp().masked_fill(future, 0)
        a = (phi_q @ phi_k.mT).clamp(min=tiny)
        log_a_sum = a.masked_fill(future, 0).sum(-1, keepdim=True).log()
        return (p * (log_a_sum - a.log())).sum(-1).mean(), (p * (log_sum - s)).sum(-1).mean()


@torch.no_grad()
def imitate(model, idx, autocast, loss=imitation_loss, learn=False):
    """The softmax teacher reads idx (B, T), and every layer's maps are held against its weights: (n_layer, 2) losses.

    Linear and softmax model share all weights but the maps, so the teacher is `model` with softmax's output passed on.
    No layer's maps touch another's input, so with `learn` each loss goes backward at once, and memory is one layer's.
    """
    transformer, losses = model.transformer, []
    with autocast:
        x = transformer.wte(idx) + transformer.wpe(torch.arange(idx.shape[1], device=idx.device))   # (B, T, C)
        for block in transformer.h:
            q, k, v = block.attn.split_heads(block.ln_1(x))
            with torch.set_grad_enabled(learn):
                linear = block.attn.linear
                both = loss(q, k, linear.map_q(q, is_query=True), linear.map_k(k))
            if learn:
                both[0].backward()
            losses.append(torch.stack([value.detach() for value in both]))
            x = x + block.attn.merge_heads(block.attn.softmax(q, k, v, cache=None))
            x = x + block.mlp(block.ln_2(x))
    return torch.stack(losses)


def faithfulness(model, tokens, config, device, autocast, loss):
    """{"cross_entropy": [a layer], "entropy": ..., "kl": ...} on EVAL_BLOCKS blocks of the text, always the same."""
    n = (len(tokens) - 1) // config.block_size
    blocks = np.unique(np.linspace(0, n - 1, EVAL_BLOCKS).astype(int))
    total = 0
    for some_blocks in np.array_split(blocks, math.ceil(len(blocks) / config.batch_size)):
        idx = np.stack([tokens[b * config.block_size:(b + 1) * config.block_size] for b in some_blocks]).astype(np.int64)
        total += imitate(model, torch.from_numpy(idx).to(device), autocast, loss).double() * len(idx)
    cross_entropy, entropy = (total / len(blocks)).T.tolist()
    return dict(cross_entropy=cross_entropy, entropy=entropy, kl=[c - e for c, e in zip(cross_entropy, entropy)])


def distill(model, data, config, device, autocast, say):
    """Stage 1 on `model`, in place. Returns (seconds of training, faithfulness at the end)."""
    out, loss = Path(config.out), torch.compile(imitation_loss) if config.compile else imitation_loss
    model.eval().requires_grad_(False)
    for p in maps_of(model).values():
        p.requires_grad_(True)
    optimizer = make_optimizer(model, config, device)
    state = dict(step=0, seconds=0.0, loss_sum=0.0, loss_count=0)
    if config.resume:
        checkpoint = load_checkpoint(out / "last.pt")
        load_maps(model, out / "last.pt")
        optimizer.load_state_dict(checkpoint["optimizer"])
        state = checkpoint["state"]
    out.mkdir(parents=True, exist_ok=True)
    layers = [list(block.attn.linear.parameters()) for block in model.transformer.h]
    kinds, T = ("cross_entropy", "entropy", "kl"), config.block_size
    log = Log(out / "log.csv", state["step"], ("step", "tokens", "lr", "train_cross_entropy", *kinds, "seconds",
                                               *(f"{kind}_{i}" for kind in kinds for i in range(len(layers)))))

    def save():
        write_atomically(out / "last.pt", lambda f: torch.save(dict(
            model={n: p.detach() for n, p in maps_of(model).items()}, optimizer=optimizer.state_dict(), state=state,
            config=asdict(config), model_config=asdict(model.config), meta=data["meta"]), f))

    with interrupts(say) as received, tqdm(total=config.steps, initial=state["step"], unit="step", disable=None) as bar:
        for step in range(state["step"], config.steps + 1):
            if step % config.eval_every == 0 or step == config.steps:
                report = faithfulness(model, data["valid"], config, device, autocast, loss)
                means = [float(np.mean(report[kind])) for kind in kinds]
                stop_if_not_finite(means[0], step, config)
                say(f"step {step:5d}  KL {means[2]:.4f} nats a query, by layer " + " ".join(f"{x:.3f}" for x in report["kl"]))
                save()
                log.write((step, step * config.batch_size * T, learning_rate(step, config),
                           state["loss_sum"] / max(1, state["loss_count"]), *means, state["seconds"],
                           *(x for kind in kinds for x in report[kind])))
                state.update(loss_sum=0.0, loss_count=0)
            if step == config.steps:
                break
            began = time.perf_counter()
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step, config)
            x, _ = get_batch(data["train"], config, step, 0, 1, device)
            losses = imitate(model, x, autocast, loss, learn=True)
            for layer in layers:
                # An infinite norm (t2r: 1 / a for a near zero) makes this write zeros: that layer waits a step.
                torch.nn.utils.clip_grad_norm_(layer, config.clip)
            mean = losses[:, 0].mean().item()
            stop_if_not_finite(mean, step, config)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            state.update(step=step + 1, loss_sum=state["loss_sum"] + mean, loss_count=state["loss_count"] + 1,
                         seconds=state["seconds"] + time.perf_counter() - began)
            bar.set_postfix(cross_entropy=f"{mean:.3f}", floor=f"{losses[:, 1].mean().item():.3f}")
            bar.update()
            if received:
                save()
                say(f"stopped after step {step + 1}, saved: add --resume to the command to go on")
                raise SystemExit(130)
    model.requires_grad_(True)
    return state["seconds"], report


# ---------------------------------------------------------------------------------------------------------------------
# The conversion


def stage_config(config, model, stage, **changes):
    """The TrainConfig of a stage: the model's shape, and what both dataclasses call by the same name."""
    steps = changes.get("steps", config.steps)
    shared = {f.name: getattr(config, f.name) for f in fields(TrainConfig) if f.name != "preset" and hasattr(config, f.name)}
    shape = {f.name: getattr(model.config, f.name) for f in fields(GPTConfig) if f.name != "vocab_size"}
    out = table_folder(config) / run_name(config) / stage
    changes |= dict(out=str(out), warmup=round(config.warmup * steps), resume=config.resume and (out / "last.pt").exists())
    return TrainConfig(**shared | shape | changes)


class Results:
    """summary.json of --out: a row for each stage of each conversion, whatever run made it."""

    def __init__(self, folder):
        self.path = folder / "summary.json"
        self.rows = json.loads(self.path.read_text()) if self.path.exists() else []

    def find(self, **values):
        return [row for row in self.rows if values.items() <= row.items()]

    def add(self, **row):
        replaced = self.find(name=row["name"], stage=row["stage"], tokens=row["tokens"])
        row = dict(test_ppl=None, seconds=None, peak_gib=None) | row | provenance()
        self.rows = [r for r in self.rows if r not in replaced] + [row]
        save_json(self.path, self.rows)
        tqdm.write(f"{row['name']}, {row['stage']}: valid {row['valid_nats']:.4f} nats, perplexity {row['valid_ppl']:.2f}")

    def __str__(self):
        """The table. The ratio is that of perplexities, to the best teacher that was finetuned for as many tokens."""
        lines = [f"{'':24}{'stage':12}{'tokens':>13}{'nats':>9}{'valid ppl':>11}{'test ppl':>10}{'ratio':>8}{'seconds':>9}"]
        for r in self.rows:
            tokens = dict(tokens=r["tokens"]) if r["stage"] == "finetuned" else {}
            split = "valid" if r["test_ppl"] is None else "test"
            best = min(self.find(attention="softmax", stage="finetuned", **tokens), key=lambda b: b["valid_nats"], default=None)
            ratio = f"{r[split + '_ppl'] / best[split + '_ppl']:.3f}" if best else "-"
            cells = ["-" if x is None else f"{x:.{n}f}" for x, n in ((r["test_ppl"], 2), (r["seconds"], 0))]
            lines.append(f"{r['name']:24}{r['stage']:12}{r['tokens']:13,}{r['valid_nats']:9.4f}{r['valid_ppl']:11.2f}"
                         f"{cells[0]:>10}{ratio:>8}{cells[1]:>9}")
        return "\n".join(lines)


def convert(config):
    """Teacher, swapped, distilled, finetuned, and a row of the results after each. Returns the Results of --out."""
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise ValueError("convert_gpt2.py is one process: start it with python, and continue its finetuned/ run with "
                         "torchrun train_gpt.py --resume")
    if config.export and Path(config.export).exists():
        raise ValueError(f"--export {config.export} is there already: choose another folder or move it away")
    folder, name, say = table_folder(config), run_name(config), tqdm.write
    device, dtype, why = pick_device(config.device, config.dtype)
    autocast = torch.autocast(device.type, dtype) if dtype else nullcontext()
    teacher, tokenizer = load_teacher(config)
    student = swap(teacher, config)
    stage1 = stage_config(config, student, "distilled", steps=config.distill_steps, accum=1, lr=config.distill_lr,
                          batch_size=config.distill_batch_size, map_lr_scale=1.0, weight_decay=0.0, lora_rank=0)
    stage2 = stage_config(config, student, "finetuned")
    data = find_text(stage2, teacher, tokenizer)

    def measure(model):
        batch = config.batch_size // config.accum
        return evaluate_splits(model.to(device).eval(), data, stage2.block_size, batch, device, autocast)

    results, base = Results(folder), dict(name="teacher", attention="softmax", stage="teacher", tokens=0)
    measured = measure(teacher)
    del teacher
    for row in results.find(**base):
        if abs(row["valid_nats"] - measured["valid_nats"]) > 0.01:  # a GPU and a CPU differ by less
            raise ValueError(f"{folder} holds results of another teacher, text or block size: choose another --out")
    if not results.find(**base):
        folder.mkdir(parents=True, exist_ok=True)
        results.add(**base, **measured)
    tokens = config.steps * config.batch_size * stage2.block_size
    if config.reference and config.attention != "softmax" and config.steps and not results.find(
            attention="softmax", stage="finetuned", tokens=tokens):
        say("first the teacher, finetuned for as many steps: what the result is compared with")
        again = config.resume and (folder / "softmax" / "config.json").exists()
        results = convert(replace(config, attention="softmax", name="", maps="", export="", resume=again))

    start_run(folder / name, config, say)
    row = dict(name=name, attention=config.attention)
    if student.config.attention != "softmax":
        student, learns = student.to(device), bool(maps_of(student))
        if not config.maps and not (config.resume and results.find(**row, stage="swapped")):
            kl = faithfulness(student, data["valid"], stage1, device, autocast, imitation_loss)
            results.add(**row, stage="swapped", tokens=0, **measure(student), **kl)
        if config.distill_steps and not learns:
            say(f"{config.attention} has no parameters that could be distilled: stage 1 is skipped")
        elif config.distill_steps or config.maps:
            seconds, kl = distill(student, data, stage1, device, autocast, say)
            peak, trained = peak_gib(device), stage1.steps * stage1.batch_size * stage1.block_size
            if not (config.resume and results.find(**row, stage="distilled")):
                results.add(**row, stage="distilled", tokens=trained, **measure(student), **kl, seconds=seconds, peak_gib=peak)
    summary = train(stage2, student)
    if config.steps:
        kept = ("parameters", "tokens", "best_step", "peak_gib", *measured)
        results.add(**row, stage="finetuned", seconds=summary["train_seconds"], **{k: summary[k] for k in kept})
    if config.export:
        export(load_model(folder / name / "finetuned" / "best.pt")[0], config.export)
        say(f"wrote {config.export}")
    return results


def find_text(config, teacher, tokenizer):
    data = find_data(config, rank=0, world=1)
    meta, vocab_size = data["meta"], teacher.config.vocab_size
    if meta["vocab_size"] != vocab_size or tokenizer not in (None, meta["tokenizer"]):
        raise ValueError(f"the text has {meta['vocab_size']} different tokens ({meta['tokenizer']}), the teacher "
                         f"{vocab_size}{f' ({tokenizer})' if tokenizer else ''}: prepare a text with data/prepare.py and "
                         "the teacher's --tokenizer, and name it with --data")
    return data


def start_run(run, config, say):
    if config.resume:
        refuse_changes(saved_config(config), config, MAY_CHANGE)
    elif run.exists():
        move_aside(run, say)
    run.mkdir(parents=True, exist_ok=True)
    save_json(run / "config.json", asdict(config) | provenance())


if __name__ == "__main__":
    cli(lambda: print(convert(parse_config(ConvertConfig, PRESETS, None, saved_config, MAY_CHANGE))))
