"""Turn a trained softmax GPT-2 into a Hedgehog GPT-2: distil its attention into feature maps, then finetune.

    python convert_gpt2.py                                 the tiny softmax model of train_gpt.py, trained if need be
    python convert_gpt2.py --attention t2r                 the same with another feature map
    python convert_gpt2.py --distill-steps 0               the same without distillation
    python convert_gpt2.py --preset wikitext103-fast       the GPT of that preset of train_gpt.py, 5 minutes of an H100
    python convert_gpt2.py --preset gpt2                   GPT-2 124M on WikiText-103, the paper's experiment

The method is `swap`, `imitation_loss`, `imitate` and `distill`, and `convert` puts it together; the rest is options,
checks and the table.

The teacher is GPT-2 from the Hugging Face hub, a folder that holds its two files, or a run of train_gpt.py. All
results go into one summary.json in --out, where each conversion has a folder: in it distilled/ holds the maps alone,
and finetuned/ is a run of train_gpt.py: sample.py writes with it, train_gpt.py --resume --steps N trains it further.
"""

import json
import math
import os
import re
import time
from contextlib import nullcontext
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from data.prepare import load_tokenizer
from hedgehog import ATTENTIONS, GPT, GPTConfig
from train_gpt import (
    MAY_CHANGE_ON_RESUME, Log, Options, TrainConfig, best_of, check_least, cli, encode_prompt, evaluate_splits,
    find_data, get_batch, holding, interrupts, largest, learning_rate, load_checkpoint, load_model, lock_folder,
    make_optimizer, mean_loss, move_aside, opt, parse_config, peak_gib, pick_device, provenance, refuse_changes,
    reset_peak, save_json, stop_if_not_finite, train, write_atomically)
from train_gpt import PRESETS as TRAIN_PRESETS

EVAL_BLOCKS = 32  # of the validation text, evenly spread, on which the maps are compared with softmax
KINDS = ("cross_entropy", "entropy", "kl")
TINY = "runs/tiny-softmax"  # the teacher that is trained if none is named
GPT2, GPT2_TOKENS = ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl"), 50257
MAY_CHANGE = MAY_CHANGE_ON_RESUME | {"name", "reference", "export"}


@dataclass
class ConvertConfig(Options):
    preset: str = opt("tiny", "named set of defaults; any flag overrides it", ("tiny", "wikitext103-fast", "gpt2"))
    teacher: str = opt("", f"{', '.join(GPT2)}; a folder with model.safetensors and config.json, and a .sha256 beside "
                       "each that is to be checked; a run or .pt file of train_gpt.py, or a conversion. Empty: "
                       "runs/tiny-softmax, trained if it is not there")
    attention: str = opt("hedgehog", "the feature map, of Hedgehog's two hedgehog_exp is the better; softmax: only "
                         "finetune the teacher", ATTENTIONS)
    data: str = opt("", "folder made by data/prepare.py; empty: that of a --teacher of train_gpt.py, else data/pydoc")
    out: str = opt("", "folder of the results; empty: runs/convert-PRESET")
    name: str = opt("", "of this conversion, its folder in --out; empty: its --attention")
    resume: bool = opt(False, "go on with the conversion in --out; flags not given are taken from it")
    reference: bool = opt(True, "first finetune the teacher as well, unless --out has such a row")
    export: str = opt("", "also write the result there, as model.safetensors and config.json")
    # the new model
    block_size: int = opt(0, "context length in tokens; 0: the teacher's")
    short_conv: int = opt(0, "tokens that a convolution of q, k and v reaches over, not in the paper; it starts as the "
                          "identity and learns in stage 2; 0: as the teacher, mostly none")
    # stage 1: the maps alone learn to imitate softmax's weights
    maps: str = opt("", "start from the maps of this checkpoint: a distilled/last.pt, or any of a model like this one")
    distill_steps: int = opt(400, "optimizer steps of stage 1; 0: no distillation")
    distill_batch_size: int = opt(8, "sequences a step of stage 1")
    distill_lr: float = opt(1e-2, "peak learning rate of stage 1; on the tiny model t2r learns best at 1e-3")
    # stage 2: the language-modelling loss, as in train_gpt.py
    steps: int = opt(300, "optimizer steps of stage 2; 0: no finetuning")
    batch_size: int = opt(8, "sequences a step of stage 2")
    accum: int = opt(1, "micro-batches a step of stage 2; doubling it halves the memory, not the batch")
    lr: float = opt(6e-4, "peak learning rate of stage 2")
    map_lr_scale: float = opt(1.0, "learning rate of the feature maps in stage 2, times --lr")
    weight_decay: float = opt(0.1, "on matrices, in stage 2")
    # both
    warmup: float = opt(0.05, "part of the steps of each stage in which the learning rate rises")
    beta2: float = opt(0.999, "AdamW's second moment")
    clip: float = opt(1.0, "largest norm of the gradient; in stage 1 of each layer's")
    eval_every: int = opt(100, "steps between evaluations, each of which also writes a checkpoint")

    def __post_init__(self):
        super().__post_init__()
        check_least(self, block_size=0, short_conv=0, distill_steps=0, distill_batch_size=1, distill_lr=0)
        if not 0 <= self.warmup <= 1:
            raise ValueError(f"--warmup {self.warmup} is a part of the steps: it must be in [0, 1]")
        taken = self.name == "teacher" or self.name == "softmax" and not is_plain(self)
        if taken or not re.fullmatch(r"(\w[\w.+=-]*)?", self.name):
            raise ValueError(f"--name {self.name!r} must be letters, digits and . + = - _ and begin with one of the "
                             "first; teacher is the name of the teacher's row, softmax that of the finetuned teacher")
        if self.hybrid_window:
            GPTConfig(attention=self.attention, hybrid_window=self.hybrid_window)  # refuses what does not go together
        if self.window and not self.softmax_layers:
            raise ValueError(f"--window {self.window} is that of the first layers: say how many with --softmax-layers")
        if self.softmax_layers and not self.window and self.attention == "softmax":
            raise ValueError("--softmax-layers without --window changes nothing where all layers are softmax")
        if self.short_conv and self.lora_rank:
            raise ValueError("--lora-rank trains low-rank updates alone, so --short-conv would stay the identity: "
                             "leave out one of them")
        if self.batch_size % max(1, self.accum):
            raise ValueError(f"--batch-size {self.batch_size} must be a multiple of --accum {self.accum}")


PRESETS = {
    # Small steps of a small model: it learns more in two minutes at these rates than at the paper's.
    "tiny": dict(distill_batch_size=4, distill_lr=3e-2, lr=2e-3),
    # The teacher that train_gpt.py makes in ten minutes of an H100, converted in about five.
    "wikitext103-fast": dict(
        teacher="runs/wikitext103-fast-softmax", data="data/wikitext103", distill_steps=2000, steps=2000, batch_size=32,
        eval_every=500, chunk_size=128, segment_size=0, compile=True),
    # Distil 2 epochs of 118M tokens, 8 x 1,024 a step, then train all weights at 6e-4: the paper. Its batch and length
    # of the second stage are not known to us: one epoch of the same batch here.
    "gpt2": dict(teacher="gpt2", data="data/wikitext103", distill_steps=2 * 14394, steps=14394, eval_every=1000,
                 chunk_size=128, segment_size=0, compile=True),
}


def is_plain(config):
    """The teacher as it is, only finetuned: what every other conversion is compared with."""
    return config.attention == "softmax" and not config.short_conv and not config.window


def table_folder(config):
    return Path(config.out or f"runs/convert-{config.preset}")


def run_name(config):
    undistilled = config.attention != "softmax" and not config.distill_steps and not config.maps
    more = f"-conv{config.short_conv}" if config.short_conv else ""
    if config.softmax_layers:
        more += f"-first{config.softmax_layers}" + (f"x{config.window}" if config.window else "")
    more += f"-hybrid{config.hybrid_window}" if config.hybrid_window else ""
    return config.name or config.attention + more + ("-undistilled" if undistilled else "")


def reference_name(config):
    """Of the teacher, finetuned as the conversion is."""
    return f"softmax-lora{config.lora_rank}" if config.lora_rank else "softmax"


def saved_config(config):
    path = table_folder(config) / run_name(config) / "config.json"
    try:
        return asdict(ConvertConfig(**json.loads(path.read_text())["config"]))  # a run may be older than some flags
    except FileNotFoundError:
        raise ValueError(f"no conversion at {path.parent}: leave out --resume, or mend --out, --name or "
                         "--attention") from None
    except (json.JSONDecodeError, UnicodeDecodeError, LookupError, TypeError):
        raise ValueError(f"{path} is damaged: leave out --resume to begin again") from None


# ---------------------------------------------------------------------------------------------------------------------
# The teacher


def text_of(teacher):
    """The folder of the text that a run of train_gpt.py learned; "", which is data/pydoc, for any other teacher."""
    path = best_of(Path(teacher or TINY))
    folder = load_checkpoint(path, mmap=True)["config"]["data"] if teacher not in GPT2 and path.exists() else ""
    if folder and not Path(folder, "meta.json").exists():
        raise ValueError(f"the teacher {path} learned the text in {folder}, which is not there: name one with --data")
    return folder


def load_teacher(config):
    """(a softmax GPT, the tokenizer it was trained with or None)."""
    name, path = config.teacher, Path(config.teacher or TINY)
    if name in GPT2:
        path = gpt2_files().download_teacher(name)
    elif not name and not (path / "summary.json").exists():
        print(f"no teacher in {path}: training it first")
        flags = ["--attention", "softmax", "--out", str(path), "--device", config.device]
        train(parse_config(TrainConfig, TRAIN_PRESETS, flags + ["--resume"] * (path / "last.pt").exists()),
              how="give the same command again")
    best = best_of(path)
    if path.suffix == ".pt" or best.exists():
        model, checkpoint = load_model(best)
        tokenizer = checkpoint["meta"]["tokenizer"]
    elif path.is_dir():
        model, tokenizer = gpt2_files().load_gpt2(path), None
    else:
        raise ValueError(f"no teacher at {path}: give one of {', '.join(GPT2)}, a folder with model.safetensors and "
                         "config.json, or a softmax run of train_gpt.py")
    if model.config.attention != "softmax":
        raise ValueError(f"the teacher {path} is linear already ({model.config.attention}): give one with softmax")
    return model, tokenizer


def gpt2_files():
    """data/gpt2_weights.py, imported late, so that a teacher of train_gpt.py does without safetensors."""
    from data import gpt2_weights
    return gpt2_weights


def swap(teacher, config):
    """A GPT with the teacher's weights and linear attention: what is new in it is exactly the feature maps, the gates
    of --hybrid-window included, and with --short-conv the convolutions, which start as the identity."""
    block_size, longest = config.block_size or teacher.config.block_size, teacher.config.block_size
    if block_size > longest:
        raise ValueError(f"--block-size {block_size}: the teacher knows {longest} positions, take at most that")
    if teacher.config.window:
        raise ValueError(f"the teacher's first layers see {teacher.config.window} tokens: give one with plain softmax")
    before, short_conv = teacher.config.short_conv, getattr(config, "short_conv", 0)
    if short_conv and before not in (0, short_conv):
        raise ValueError(f"--short-conv {short_conv}: the teacher has one of {before} tokens, leave the flag out")
    options = {f.name: getattr(config, f.name) for f in fields(GPTConfig) if hasattr(config, f.name)}
    options |= {"block_size": block_size, "short_conv": short_conv or before}
    if options["attention"] != "softmax" and options.get("softmax_layers", 0) >= teacher.config.n_layer:
        raise ValueError(f"--softmax-layers {options['softmax_layers']} leaves none of the teacher's "
                         f"{teacher.config.n_layer} layers to {options['attention']}: take fewer")
    torch.manual_seed(config.seed)  # performer draws its features
    student = GPT(replace(teacher.config, **options))
    weights = teacher.state_dict()
    weights["transformer.wpe.weight"] = weights["transformer.wpe.weight"][:block_size]
    new, left = student.load_state_dict(weights, strict=False)
    assert not left and all(".map_" in name or short_conv > before and "short_conv" in name for name in new)
    if config.maps:
        load_maps(student, config.maps)
    return student


# ---------------------------------------------------------------------------------------------------------------------
# Stage 1, attention distillation: feature maps learn to give each layer the weights that softmax gives it. Only the
# maps learn, and every layer learns from the activations of the teacher, whose other weights the linear model shares.


def imitation_loss(q, k, phi_q, phi_k, keep=None, causal=True, window=0, log_gate=None, bounds=(1e-37, 1e34),
                   faint=1e-20):
    """(cross-entropy of the linear weights under softmax's, entropy of softmax's): means over queries, heads and batch.

        L_i = - sum_{j<=i} p_ij log(a_ij / sum_{m<=i} a_im)      p = softmax(q.k / sqrt(D)), a = phi(q).phi(k)

    q, k (B, H, T, D) raw, phi_q, phi_k (B, H, T, P). Time and memory O(T^2). Source: the paper, and LoLCATs' code.
    keep (B, T): False for padding, which counts neither as a key nor as a query. causal=False: the sums run over all j.
    window, log_gate (B, H, T, 1): those of a HybridAttention, where a_ij is exp(q.k / sqrt(D)) for the last `window`
    keys and phi(q).phi(k) exp(log_gate) before. What is said below of a_ij and its sum is then of phi(q).phi(k) there.

    The entropy is the floor, and no maps get below it: a_ij is bounded inside the sum as well as above it, so that
    a / sum(a) is a distribution whatever a is. With an addend, log(a + eps) - log(sum(a) + eps), the weights of n keys
    sum to n as a -> 0: the optimiser goes there, and whole heads collapse under a loss that looks ever better.

    The loss does not depend on the scale of the features, so nothing in it keeps sum_m a_im above 1e-30, where
    `linear_attention` takes query i for one that attends to nothing: a distilled GPT of 124M had such a head. So the
    gradient, not the value, is also that of log(faint / sum_m a_im) where the sum is below `faint` (and, as all of it,
    zero for an a_ij below the lower bound).
    """
    with torch.autocast(q.device.type, enabled=False):
        q, k = q.to(phi_q.dtype), k.to(phi_k.dtype)                                       # float32 at least
        B, H, T, D = q.shape
        hidden, weight = torch.ones(T, T, dtype=torch.bool, device=q.device).triu(1) & causal, 1 / (B * H * T)
        if keep is not None:  # padding is a query that sees padding, too, so that its loss is finite; it weighs nothing
            hidden = hidden | (keep.unsqueeze(-1) & ~keep.unsqueeze(-2)).unsqueeze(1)     # (B, 1, T, T)
            weight = keep.unsqueeze(1).to(q.dtype) / (H * keep.sum())                     # (B, 1, T)
        s = q @ k.mT / math.sqrt(D)                                                       # (B, H, T, T), as all below
        log_sum = s.masked_fill(hidden, -math.inf).logsumexp(-1, keepdim=True)
        p = (s - log_sum).exp().masked_fill(hidden, 0)
        a = (phi_q @ phi_k.mT).clamp(*bounds)
        # near: in the window or in the future. With an `if`: Inductor of PyTorch 2.11 takes no tensor & (window > 0).
        log_a, near = a.log(), torch.ones_like(hidden).triu(1 - window) if window else torch.zeros_like(hidden)
        log_a_sum = a.masked_fill(hidden | near, 0).sum(-1, keepdim=True).clamp(min=bounds[0]).log()
        too_faint = (math.log(faint) - log_a_sum.squeeze(-1)).clamp(min=0)                # (B, H, T)
        if window:  # as logarithms, since the gate, which holds what phi(q) was divided by, may be beyond float32
            log_a = torch.where(near, s, log_a + log_gate)
            log_a_sum = log_a.masked_fill(hidden, -math.inf).logsumexp(-1, keepdim=True)
        cross_entropy = (p * (log_a_sum - log_a)).sum(-1) + (too_faint - too_faint.detach())
        return (cross_entropy * weight).sum(), ((p * (log_sum - s)).sum(-1) * weight).sum()


def compare(maps, q, k, loss=imitation_loss, keep=None):
    """`loss` of the maps and the gates of one layer's attention. q (B, H, T, D), k (B, H or, grouped, K, T, D), raw."""
    phi_q, phi_k = maps.map_q(q, is_query=True), maps.map_k(k)
    if k.shape[1] < q.shape[1]:
        k, phi_k = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, phi_k))
    hybrid = dict(window=maps.window, log_gate=maps.log_gate(q)) if maps.window else {}
    return loss(q, k, phi_q, phi_k, keep, **hybrid)


@torch.no_grad()
def imitate(model, idx, autocast, loss=imitation_loss, learn=False):
    """The teacher reads idx (B, T), and each layer's maps are compared with its weights: (n_layer, 2), as in the loss,
    zeros for a layer that keeps softmax.

    Linear and softmax model share all but the maps, so the teacher is `model` with softmax's output passed on. What a
    layer reads depends on no map, so with `learn` each loss goes backward at once: memory is that of one layer.
    """
    transformer, losses = model.transformer, []
    with autocast:
        x = transformer.wte(idx) + transformer.wpe(torch.arange(idx.shape[1], device=idx.device))   # (B, T, C)
        for block in transformer.h:
            q, k, v = block.attn.split_heads(block.ln_1(x))                               # (B, H, T, D)
            maps, both = block.attn.linear, x.new_zeros(2)
            if maps is not None:
                with torch.set_grad_enabled(learn):
                    both = compare(maps, q, k, loss)
                if learn:
                    both[0].backward()
            losses.append(torch.stack([value.detach() for value in both]))
            x = x + block.attn.merge_heads(block.attn.softmax(q, k, v, cache=None))
            x = x + block.mlp(block.ln_2(x))
    return torch.stack(losses)


def faithfulness(model, tokens, config, device, autocast, loss=imitation_loss):
    """{"cross_entropy": [one a layer], "entropy": ..., "kl": ...} on EVAL_BLOCKS blocks of the text, always those."""
    T, n_blocks = config.block_size, (len(tokens) - 1) // config.block_size
    starts = np.unique(np.linspace(0, n_blocks - 1, EVAL_BLOCKS).astype(int)) * T
    total = 0
    for part in np.array_split(starts, math.ceil(len(starts) / config.batch_size)):
        idx = torch.from_numpy(np.stack([tokens[s:s + T] for s in part]).astype(np.int64)).to(device)
        total += imitate(model, idx, autocast, loss).cpu().double() * len(part)
    cross_entropy, entropy = (total / len(starts)).T.tolist()
    return dict(cross_entropy=cross_entropy, entropy=entropy, kl=[c - e for c, e in zip(cross_entropy, entropy)])


def mean_of_layers(values, softmax_layers):
    """Of those that do not keep softmax, whose values are zeros."""
    return float(np.mean(values[softmax_layers:]))


def maps_of(model):
    return {name: p for name, p in model.named_parameters() if ".map_" in name}


def learn_maps_alone(model):
    model.requires_grad_(False)
    for p in maps_of(model).values():
        p.requires_grad_(True)


def load_maps(model, path):
    """Into `model`, the feature maps of a checkpoint of `distill` or of train_gpt.py. Returns the checkpoint."""
    checkpoint, maps = load_checkpoint(path), maps_of(model)
    if not maps:
        raise ValueError(f"{model.config.attention} learns no maps that {path} could hold: leave out --maps")
    given = {name: p for name, p in checkpoint["model"].items() if name in maps}
    layers, known = tuple({name.split("map_")[0] for name in maps}), model.state_dict()  # some may keep softmax
    more = [name for name in checkpoint["model"] if name.startswith(layers) and name not in known]
    shapes = [{name: p.shape for name, p in held.items()} for held in (given, maps)]
    if more or shapes[0] != shapes[1] or checkpoint["model_config"]["attention"] != model.config.attention:
        raise ValueError(f"{path} does not hold the feature maps of this model: --attention, --feature-bias, --tie-qk, "
                         "--learn-temperature, --hybrid-window or none, and the teacher must be those that it was made "
                         "with, and --softmax-layers at least as many")
    model.load_state_dict(given, strict=False)
    return checkpoint


def distill(model, data, config, device, autocast, say, how="add --resume to the command", command=""):
    """Train the maps of `model`, in place, as `config` (a TrainConfig) says. Returns the final faithfulness, and the
    seconds and peak_gib that it took. `how` and `command` are those of `train`.

    Writes log.csv and last.pt, which holds the maps alone, into config.out.
    """
    out, loss = Path(config.out), torch.compile(imitation_loss) if config.compile else imitation_loss
    layers = [list(block.attn.linear.parameters()) if block.attn.linear else [] for block in model.transformer.h]
    learn_maps_alone(model.eval())                                                        # no dropout in the teacher
    optimizer = make_optimizer(model, config, device)
    state = dict(step=0, seconds=0.0, loss_sum=0.0, loss_count=0)
    if config.resume:
        checkpoint = load_maps(model, out / "last.pt")
        optimizer.load_state_dict(checkpoint["optimizer"])
        state = checkpoint["state"]
    out.mkdir(parents=True, exist_ok=True)
    about = provenance(device, command)
    log = Log(out / "log.csv", state["step"], (
        "step", "tokens", "lr", "train_cross_entropy", *KINDS, "seconds", "peak_gib", *about,
        *(f"{kind}_{i}" for kind in KINDS for i in range(len(layers)))))

    def save():
        state["peak_gib"] = largest(state.get("peak_gib"), peak_gib(device))
        write_atomically(out / "last.pt", lambda f: torch.save(dict(
            model={name: p.detach() for name, p in maps_of(model).items()}, optimizer=optimizer.state_dict(),
            state=state, config=asdict(config), model_config=asdict(model.config), meta=data["meta"]), f))

    first = state["step"]
    with interrupts(say) as received, tqdm(total=config.steps, initial=first, unit="step", disable=None) as bar:
        for step in range(first, config.steps + 1):
            if step % config.eval_every == 0 or step == config.steps:
                report = faithfulness(model, data["valid"], config, device, autocast, loss)
                means = [mean_of_layers(report[kind], model.config.softmax_layers) for kind in KINDS]
                stop_if_not_finite(means[0], step, config, "--distill-lr")
                say(f"step {step:5d}  KL {means[2]:.4f} nats, by layer " + " ".join(f"{x:.3f}" for x in report["kl"]))
                save()
                log.write((step, step * config.batch_size * config.block_size, learning_rate(step, config),
                           mean_loss(state), *means, state["seconds"], state["peak_gib"], *about.values(),
                           *(x for kind in KINDS for x in report[kind])))
                state.update(loss_sum=0.0, loss_count=0)
            if step == config.steps:
                break
            began = time.perf_counter()
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step, config)
            idx, _ = get_batch(data["train"], config, step, 0, 1, device)
            losses = imitate(model, idx, autocast, loss, learn=True)
            cross_entropy, entropy = losses[model.config.softmax_layers:].mean(dim=0).tolist()
            stop_if_not_finite(cross_entropy, step, config, "--distill-lr")
            for layer in layers:  # layers are problems of their own: a wild one must not slow the others down
                torch.nn.utils.clip_grad_norm_(layer, config.clip)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            state.update(step=step + 1, loss_sum=state["loss_sum"] + cross_entropy, loss_count=state["loss_count"] + 1,
                         seconds=state["seconds"] + time.perf_counter() - began)
            bar.set_postfix(cross_entropy=f"{cross_entropy:.3f}", floor=f"{entropy:.3f}")
            bar.update()
            if received:
                save()
                say(f"stopped after step {step + 1}, saved: {how} to go on")
                raise SystemExit(130)
    model.requires_grad_(True)
    return report | dict(seconds=state["seconds"], peak_gib=state["peak_gib"])


# ---------------------------------------------------------------------------------------------------------------------
# The conversion


def stage_config(config, model, stage, **changes):
    """The TrainConfig of a stage: the model's shape, and what both dataclasses call by the same name."""
    shared = {f.name: getattr(config, f.name) for f in fields(TrainConfig) if hasattr(config, f.name)}
    shape = {f.name: getattr(model.config, f.name) for f in fields(GPTConfig) if f.name != "vocab_size"}
    out = table_folder(config) / run_name(config) / stage
    given = shared | shape | dict(preset="tiny", out=str(out)) | changes
    resume = config.resume and (out / "last.pt").exists()  # or this stage had not begun
    return TrainConfig(**given | dict(warmup=round(config.warmup * given["steps"]), resume=resume))


def references(rows, lora_rank, tokens=None):
    """The rows of the plain teacher, finetuned with updates of that rank (for so many tokens)."""
    return [row for row in rows if row["attention"] == "softmax" and row["stage"] == "finetuned"
            and row.get("lora_rank", 0) == lora_rank and not row.get("short_conv") and not row.get("window")
            and tokens in (None, row["tokens"])]


def ratio(row, rows):
    """Its perplexity over that of the best teacher that was finetuned likewise for as many tokens (a row of another
    stage: for any), on the test split if there is one. None without one, or if that was not measured there."""
    beside = references(rows, row.get("lora_rank", 0), row["tokens"] if row["stage"] == "finetuned" else None)
    ppl = "valid_ppl" if row["test_ppl"] is None else "test_ppl"
    best = min(beside, key=lambda r: r["valid_nats"])[ppl] if beside else None
    return row[ppl] / best if best else None


class Results:
    """summary.json of --out: a row for each stage of each conversion, whatever run made it. Its seconds and peak_gib
    are those of the training, and of the evaluation where nothing was trained (teacher and swapped); its command is the
    one that began the conversion."""

    def __init__(self, folder, device):
        self.path, self.device, self.command, self.resumed = folder / "summary.json", device, "", 0
        self.rows = self.read()

    def read(self):
        try:
            rows = json.loads(self.path.read_text()) if self.path.exists() else []
            assert all(row["stage"] and row["name"] for row in rows)
        except (ValueError, TypeError, LookupError, AssertionError):
            raise ValueError(f"{self.path} is damaged, or of train_gpt.py: choose another --out") from None
        return rows

    def find(self, **values):
        return [row for row in self.rows if values.items() <= row.items()]

    def change(self, change):
        with lock_folder(self.path.parent, wait=True):
            self.rows = change(self.read())  # a conversion beside this one may have added some
            save_json(self.path, self.rows)

    def rename(self, old, new):
        self.change(lambda rows: [r | dict(name=new) if r["name"] == old else r for r in rows
                                  if r["name"] != new])  # those of a folder of that name that was deleted

    def add(self, **row):
        key = {k: row[k] for k in ("name", "stage", "tokens")}.items()
        row = dict(test_ppl=None, seconds=None, peak_gib=None) | provenance(self.device, self.command) | row
        row["resumed"] = self.resumed
        self.change(lambda rows: [r for r in rows if not key <= r.items()] + [row])
        tqdm.write(f"{row['name']}, {row['stage']}: valid {row['valid_nats']:.4f} nats, "
                   f"perplexity {row['valid_ppl']:.2f}")

    def __str__(self):
        """The table."""
        head = ("name", "stage", "tokens", "nats", "valid ppl", "test ppl", "ratio", "seconds", "GiB")
        width = max([22, *(len(r["name"]) for r in self.rows)]) + 2
        form = f"{{:{width}}}{{:10}}{{:>13}}{{:>9}}{{:>11}}{{:>11}}{{:>8}}{{:>9}}{{:>7}}".format
        lines = [form(*head)]
        for r in self.rows:
            numbers = ((r["valid_nats"], 4), (r["valid_ppl"], 2), (r["test_ppl"], 2), (ratio(r, self.rows), 3),
                       (r["seconds"], 0), (r["peak_gib"], 1))
            lines.append(form(r["name"], r["stage"], f"{r['tokens']:,}",
                              *("-" if x is None else f"{x:.{digits}f}" for x, digits in numbers)))
        return "\n".join(lines)


@holding
def convert(config, *, held):
    """Teacher, swapped, distilled, finetuned, and a row of the results after each. Returns the Results of --out."""
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise ValueError("convert_gpt2.py is one process: start it with python, and continue its finetuned/ run with "
                         "torchrun train_gpt.py --resume")
    exported = bool(config.export and gpt2_files() and Path(config.export).exists())
    if exported and not (config.resume and saved_config(config)["export"] == config.export):
        raise ValueError(f"--export {config.export} is there already: choose another folder or move it away")
    if not config.resume and not config.data:  # a resumed conversion goes on with the text it was started with
        config = replace(config, data=text_of(config.teacher))
    folder, name, say = table_folder(config), run_name(config), tqdm.write
    device, dtype, why = pick_device(config.device, config.dtype)
    autocast = torch.autocast(device.type, dtype) if dtype else nullcontext()
    meta = find_data(config, rank=0, world=1)["meta"]  # what it lacks is better told before a download than after
    encode_prompt(load_tokenizer(meta["tokenizer"]), config.prompt)
    if config.teacher in GPT2:
        check_text(meta, GPT2_TOKENS, None)
    check_can_be_made(folder / name, "--out")
    if config.export:
        check_export(config)
    teacher, tokenizer = load_teacher(config)
    student = swap(teacher, config)
    stage1 = stage_config(config, student, "distilled", steps=config.distill_steps, accum=1, lr=config.distill_lr,
                          batch_size=config.distill_batch_size, map_lr_scale=1.0, weight_decay=0.0, lora_rank=0)
    stage2 = stage_config(config, student, "finetuned")
    data = find_text(stage2, teacher, tokenizer)

    def measure(model):
        """Its perplexities, and what it took to find them."""
        reset_peak(device)
        began, batch = time.perf_counter(), config.batch_size // config.accum
        found = evaluate_splits(model.to(device).eval(), data, stage2.block_size, batch, device, autocast)
        return found | dict(seconds=time.perf_counter() - began, peak_gib=peak_gib(device))

    say(f"{name}: {config.teacher or 'the tiny softmax model'} with {config.attention} attention, on {why}")
    results, base = Results(folder, device), dict(name="teacher", attention="softmax", stage="teacher", tokens=0)
    known, made = results.find(**base), {row["stage"] for row in results.find(name=name) if config.resume}
    run = Path(stage2.out)  # which train_gpt.py may have finished, and gone on with

    def planned():
        return load_checkpoint(run / "last.pt", mmap=True)["config"]["steps"]
    finished = (run / "summary.json").exists() and ("finetuned" in made or stage2.resume and planned() > config.steps)
    if not known or not finished:
        before = measure(teacher)
        if any(abs(row["valid_nats"] - before["valid_nats"]) > 0.01 for row in known):  # a GPU and a CPU differ by less
            raise ValueError(f"{folder} holds results of another teacher, text or block size: choose another --out")
    del teacher
    start_run(folder / name, config, results, say, held)
    if not known:
        results.add(**base, **before)
    beside = references(results.rows, config.lora_rank, config.steps * config.batch_size * stage2.block_size)
    if config.reference and not is_plain(config) and config.steps and not beside:
        say("first the teacher, finetuned for as many steps, is what the result is compared with")
        reference = replace(config, attention="softmax", name=reference_name(config), maps="", export="", short_conv=0,
                            softmax_layers=0, window=0, hybrid_window=0)
        results.rows = convert(replace(reference, resume=config.resume and was_begun(reference))).rows

    told = ("attention", "short_conv", "softmax_layers", "window", "hybrid_window", "lora_rank")
    row = dict(name=name, **{k: getattr(config, k) for k in told})
    if config.attention != "softmax" and not finished:
        student, tokens = student.to(device), stage1.steps * stage1.batch_size * stage1.block_size
        if not config.maps and "swapped" not in made:
            kl = faithfulness(student, data["valid"], stage1, device, autocast)
            results.add(**row, stage="swapped", tokens=0, **measure(student), **kl)
        if config.distill_steps and not maps_of(student):
            say(f"{config.attention} has no parameters that could be distilled: stage 1 is skipped")
        elif (config.distill_steps or config.maps) and not (stage2.resume and "distilled" in made):
            reset_peak(device)
            found = distill(student, data, stage1, device, autocast, say, command=results.command)
            results.add(**row, stage="distilled", tokens=tokens, **measure(student) | found)
    if not finished:
        reset_peak(device)
        train(stage2, student, command=results.command)
    summary = json.loads((run / "summary.json").read_text())
    if config.steps and not (finished and results.find(name=name, stage="finetuned", tokens=summary["tokens"])):
        kept = ("parameters", "tokens", "best_step", "peak_gib", *provenance(device))
        found = {k: x for k, x in summary.items() if k in kept or k.startswith(("valid_", "test_"))}
        results.add(**row, stage="finetuned", seconds=summary["train_seconds"], **found)
    if exported:
        say(f"{config.export} is there already, and stays as it is")
    elif config.export:
        if planned() != summary["steps"]:
            raise ValueError(f"{run} is on its way to {planned()} steps: python train_gpt.py --resume --out {run}, "
                             "then --export")
        gpt2_files().export(load_model(run / "best.pt")[0], config.export)
        say(f"wrote {config.export}")
    return results


def find_text(config, teacher, tokenizer):
    data = find_data(config, rank=0, world=1)
    check_text(data["meta"], teacher.config.vocab_size, tokenizer)
    return data


def check_text(meta, vocab_size, tokenizer):
    if meta["vocab_size"] != vocab_size or tokenizer not in (None, meta["tokenizer"]):
        raise ValueError(f"the text has {meta['vocab_size']} different tokens ({meta['tokenizer']}), the teacher "
                         f"{vocab_size} ({tokenizer or 'tokenizer unknown'}): make a text for it with data/prepare.py "
                         "and --tokenizer, and name its folder with --data")


def check_can_be_made(folder, flag):
    """That it cannot be made is told now, and not after hours."""
    there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not (there.is_dir() and os.access(there, os.W_OK)):
        raise ValueError(f"{flag}: {folder} cannot be made, {there} takes no files: choose another folder")


def check_export(config):
    """That it can be made, and is none of the folders that the conversion writes, nor above one."""
    check_can_be_made(Path(config.export), "--export")
    runs = [table_folder(config) / name for name in (run_name(config), reference_name(config))]
    ours = [Path(config.teacher or TINY), *(run / stage for run in runs for stage in ("distilled", "finetuned"))]
    if any(Path(config.export).resolve() in (path, *path.parents) for path in map(Path.resolve, ours)):
        raise ValueError(f"--export {config.export} is where the conversion itself goes: choose another folder")


def was_begun(config):
    try:
        refuse_changes(saved_config(config), config, MAY_CHANGE)
    except ValueError:
        return False
    return True


def start_run(run, config, results, say, held):
    there, path = run.exists(), run / "config.json"
    held.enter_context(lock_folder(run))
    if there and not config.resume:
        stage2 = run / "finetuned"  # which train_gpt.py --resume may be going on with
        with lock_folder(stage2) if stage2.exists() else nullcontext():
            results.rename(run.name, move_aside(run, say).name)
        held.enter_context(lock_folder(run))
    elif not config.resume and results.find(name=run.name):  # of a folder that was deleted
        results.change(lambda rows: [r for r in rows if r["name"] != run.name])
    first = json.loads(path.read_text()) if config.resume else provenance(results.device) | dict(resumed=-1)
    results.command, results.resumed = first["command"], first.get("resumed", 0) + 1
    save_json(path, first | dict(config=asdict(config), resumed=results.resumed))


if __name__ == "__main__":
    cli(lambda: print(convert(parse_config(ConvertConfig, PRESETS, None, saved_config, MAY_CHANGE))))
