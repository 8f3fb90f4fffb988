"""Attention distillation: feature maps learn to give each layer of a trained GPT the weights that softmax gives it.

Only the maps learn, and every layer learns from the activations of the teacher, whose other weights the linear model
shares. The first stage of convert_gpt2.py; `imitation_loss` is what to take into another model. Letters: hedgehog.py.
"""

import math
import time
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from train_gpt import (
    Log, get_batch, interrupts, learning_rate, load_checkpoint, make_optimizer, stop_if_not_finite, write_atomically)

EVAL_BLOCKS = 32  # of the validation text, evenly spread, on which the maps are compared with softmax
KINDS = ("cross_entropy", "entropy", "kl")


def imitation_loss(q, k, phi_q, phi_k, bounds=(1e-37, 1e34)):
    """(cross-entropy of the linear weights under softmax's, entropy of softmax's): means over queries, heads and batch.

        L_i = - sum_{j<=i} p_ij log(a_ij / sum_{m<=i} a_im)      p = softmax(q.k / sqrt(D)), a = phi(q).phi(k)

    q, k (B, H, T, D) raw, phi_q, phi_k (B, H, T, P). Time and memory O(T^2). Source: the paper, and LoLCATs' code.

    The entropy is the floor, and no maps get below it: a_ij is bounded inside the sum as well as above it, so that
    a / sum(a) is a distribution whatever a is. With an addend, log(a + eps) - log(sum(a) + eps), the weights of n keys
    sum to n as a -> 0: the optimiser goes there, and whole heads collapse under a loss that looks ever better. The
    lower bound is far below 1e-30, the least denominator of `linear_attention`, and so hides nothing that it can use.
    """
    with torch.autocast(q.device.type, enabled=False):
        q, k = q.to(phi_q.dtype), k.to(phi_k.dtype)                                       # float32 at least
        T, D = q.shape[-2:]
        future = torch.ones(T, T, dtype=torch.bool, device=q.device).triu(1)
        s = q @ k.mT / math.sqrt(D)                                                       # (B, H, T, T), as all below
        log_sum = s.masked_fill(future, -math.inf).logsumexp(-1, keepdim=True)
        p = (s - log_sum).exp().masked_fill(future, 0)
        a = (phi_q @ phi_k.mT).clamp(*bounds)
        log_a_sum = a.masked_fill(future, 0).sum(-1, keepdim=True).log()
        return (p * (log_a_sum - a.log())).sum(-1).mean(), (p * (log_sum - s)).sum(-1).mean()


@torch.no_grad()
def imitate(model, idx, autocast, loss=imitation_loss, learn=False):
    """The teacher reads idx (B, T), and each layer's maps are compared with its weights: (n_layer, 2), as in the loss.

    Linear and softmax model share all but the maps, so the teacher is `model` with softmax's output passed on. What a
    layer reads depends on no map, so with `learn` each loss goes backward at once: memory is that of one layer.
    """
    transformer, losses = model.transformer, []
    with autocast:
        x = transformer.wte(idx) + transformer.wpe(torch.arange(idx.shape[1], device=idx.device))   # (B, T, C)
        for block in transformer.h:
            q, k, v = block.attn.split_heads(block.ln_1(x))                               # (B, H, T, D)
            with torch.set_grad_enabled(learn):
                maps = block.attn.linear
                both = loss(q, k, maps.map_q(q, is_query=True), maps.map_k(k))
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


def maps_of(model):
    return {name: p for name, p in model.named_parameters() if ".map_" in name}


def load_maps(model, path):
    """Into `model`, the feature maps of a checkpoint of `distill` or of train_gpt.py. Returns the checkpoint."""
    checkpoint, maps = load_checkpoint(path), maps_of(model)
    given = {name: p for name, p in checkpoint["model"].items() if name in maps}
    if {name: p.shape for name, p in given.items()} != {name: p.shape for name, p in maps.items()}:
        raise ValueError(f"{path} does not hold the feature maps of this model: --attention, --feature-bias, --tie-qk "
                         "and the teacher must be those that it was made with")
    model.load_state_dict(given, strict=False)
    return checkpoint


def distill(model, data, config, device, autocast, say):
    """Train the maps of `model`, in place, as `config` (a TrainConfig) says. Returns (seconds, final faithfulness).

    Writes log.csv and last.pt, which holds the maps alone, into config.out.
    """
    out, loss = Path(config.out), torch.compile(imitation_loss) if config.compile else imitation_loss
    layers = [list(block.attn.linear.parameters()) for block in model.transformer.h]
    model.eval().requires_grad_(False)                                                    # no dropout in the teacher
    for p in maps_of(model).values():
        p.requires_grad_(True)
    optimizer = make_optimizer(model, config, device)
    state = dict(step=0, seconds=0.0, loss_sum=0.0, loss_count=0)
    if config.resume:
        checkpoint = load_maps(model, out / "last.pt")
        optimizer.load_state_dict(checkpoint["optimizer"])
        state = checkpoint["state"]
    out.mkdir(parents=True, exist_ok=True)
    log = Log(out / "log.csv", state["step"], ("step", "tokens", "lr", "train_cross_entropy", *KINDS, "seconds",
                                               *(f"{kind}_{i}" for kind in KINDS for i in range(len(layers)))))

    def save():
        write_atomically(out / "last.pt", lambda f: torch.save(dict(
            model={name: p.detach() for name, p in maps_of(model).items()}, optimizer=optimizer.state_dict(),
            state=state, config=asdict(config), model_config=asdict(model.config), meta=data["meta"]), f))

    first = state["step"]
    with interrupts(say) as received, tqdm(total=config.steps, initial=first, unit="step", disable=None) as bar:
        for step in range(first, config.steps + 1):
            if step % config.eval_every == 0 or step == config.steps:
                report = faithfulness(model, data["valid"], config, device, autocast, loss)
                means = [float(np.mean(report[kind])) for kind in KINDS]
                stop_if_not_finite(means[0], step, config)
                say(f"step {step:5d}  KL {means[2]:.4f} nats, by layer " + " ".join(f"{x:.3f}" for x in report["kl"]))
                save()
                log.write((step, step * config.batch_size * config.block_size, learning_rate(step, config),
                           state["loss_sum"] / max(1, state["loss_count"]), *means, state["seconds"],
                           *(x for kind in KINDS for x in report[kind])))
                state.update(loss_sum=0.0, loss_count=0)
            if step == config.steps:
                break
            began = time.perf_counter()
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step, config)
            idx, _ = get_batch(data["train"], config, step, 0, 1, device)
            cross_entropy, entropy = imitate(model, idx, autocast, loss, learn=True).mean(dim=0).tolist()
            stop_if_not_finite(cross_entropy, step, config)
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
                say(f"stopped after step {step + 1}, saved: add --resume to the command to go on")
                raise SystemExit(130)
    model.requires_grad_(True)
    return state["seconds"], report
