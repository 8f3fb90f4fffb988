"""Put Hedgehog into a Llama of the transformers library: distil its attention, then LoRA, on summaries of dialogues.

    python experiments/convert_llama.py --model FOLDER --data data/samsum             the table: softmax, Hedgehog, T2R
    python experiments/convert_llama.py --model SmolLM2-135M-Instruct.Q4_1.gguf ...   a GGUF file will do
    python experiments/convert_llama.py ... --text wiki.test.raw                      the perplexity on a text as well
    python experiments/convert_llama.py ... --hybrid-window 64 --attentions softmax hedgehog window

Any model of the Llama architecture; the attention that takes softmax's place is in hedgehog_llama.py. --data holds
SAMSum's files, train, val(idation) and test, as CSV or JSON.
"""

import copy
import math
import sys
import time
from dataclasses import asdict, dataclass, replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import torch
import torch.nn.functional as F
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # for the files of this repository, which is no package
from convert_gpt2 import compare, imitation_loss, learn_maps_alone, maps_of  # noqa: E402
from experiments.common import or_say, ready, rows_so_far, with_names  # noqa: E402
from train_gpt import (  # noqa: E402
    TrainConfig, check_least, cli, learning_rate, opt, parse_config, peak_gib, perplexity, pick_device, provenance,
    reset_peak, save_json)

try:
    import peft
    import transformers
    from data.samsum import blocks, encode, pad, read_samsum, read_text, rouge
    from experiments.hedgehog_llama import MAPS, LlamaAttention, llama_layers, swap
except ImportError as e:
    print(f"convert_llama.py: error: {e}: pip install -r requirements-experiments.txt", file=sys.stderr)
    raise SystemExit(2) from None

PAPER = {"zero-shot": 19.3, "softmax": 51.1, "hedgehog": 47.4, "t2r": 2.8}  # ROUGE-1 of Llama-2 7B
BLOCK = 1024  # tokens of --text, or of a prompt in `speed`, that are read at once
KL_ROWS = 32  # test dialogues on which the maps are compared with softmax
SPEED_TOKENS = 32


@dataclass
class LlamaConfig:
    model: str = opt("HuggingFaceTB/SmolLM2-135M-Instruct", "a Llama of transformers: folder, .gguf file or hub name")
    data: str = opt("data/samsum", "folder of SAMSum's train, val(idation) and test as CSV or JSON")
    attentions: tuple = opt(("softmax", "hedgehog", "hedgehog_exp", "t2r"), "rows, besides the model as it came",
                            ("softmax", *MAPS, "window"))
    hybrid_window: int = opt(0, "tokens that maps leave to softmax, and all that row `window` sees; 0: none, the paper")
    out: str = opt("runs/llama.json", "the rows; those that are there already are not made again")
    text: str = opt("", "a text file, for the perplexity of the converted language model")
    limit: int = opt(0, "train on only so many dialogues and test on as many; 0: all")
    max_length: int = opt(1024, "tokens of prompt and summary; longer dialogues are cut at the end")
    max_new_tokens: int = opt(100, "longest summary that is generated")
    # stage 1: the maps alone learn to imitate softmax's weights
    distill_epochs: float = opt(2.0, "passes over the training dialogues; 0: no distillation")
    distill_lr: float = opt(1e-2, "peak learning rate of the maps")
    distill_lr_t2r: float = opt(None, "that of T2R's, which need not be Hedgehog's; None: the same")
    distill_text: str = opt("", "a text file that is read in each of these epochs besides the dialogues")
    # stage 2: low-rank updates of the attention's projections learn to write summaries
    lora_epochs: float = opt(2.0, "passes over the training dialogues; 0: no finetuning")
    lora_lr: float = opt(1e-4, "peak learning rate of the low-rank updates")
    lora_text: str = opt("", "a text file that the updates learn first, in one pass, before the summaries")
    map_lr: float = opt(0.0, "peak learning rate of the maps in stage 2; 0: they stay as distilled")
    rank: int = opt(8, "of the updates")
    alpha: float = opt(16.0, "the updates count alpha / rank times")
    gradient_checkpointing: bool = opt(False, "stage 2 computes each layer twice and keeps less: for large models")
    # both
    batch_size: int = opt(8, "dialogues a step")
    seed: int = opt(0, "of the order of the dialogues and the first low-rank weights")
    device: str = opt("auto", "where to run", ("auto", "cuda", "mps", "cpu"))
    compile: bool = opt(False, "torch.compile what stage 1 computes of all pairs: less memory and time on a GPU")
    dtype: str = opt("auto", "of the model's weights; maps and states stay float32", ("auto", "float32", "bfloat16"))
    # what is measured
    generate_batch: int = opt(128, "summaries that are written at once")
    generate_lengths: tuple = opt((1024, 4096, 16384), "measure the speed of generation after so many tokens; 0: don't")
    speed_batch: int = opt(8, "sequences of that measurement")

    def __post_init__(self):
        check_least(self, limit=0, max_length=1, max_new_tokens=1, distill_epochs=0, distill_lr=0, lora_epochs=0,
                    lora_lr=0, map_lr=0, rank=1, alpha=0, batch_size=1, generate_batch=1, generate_lengths=0,
                    speed_batch=1, hybrid_window=0)
        if "window" in self.attentions and not self.hybrid_window:
            raise ValueError("the row `window` is softmax over the last tokens alone: say how many by --hybrid-window")
        if self.distill_lr_t2r is not None:
            check_least(self, distill_lr_t2r=0)


# what rows of one table may differ in; the last is a setting of T2R's row alone
MAY_DIFFER = {"attentions", "out", "device", "compile", "generate_batch", "gradient_checkpointing", "distill_lr_t2r"}
PATHS = {"model", "data", "text", "distill_text", "lora_text"}  # whose names count, and not the folders of one machine


# ---------------------------------------------------------------------------------------------------------------------
# Two stages of training


def fit(groups, examples, epochs, config, label, step_loss):
    """AdamW on `groups`, [(parameters, learning rate)], each clipped on its own. step_loss(batch of examples) -> loss,
    which goes backward unless it has done so. Returns seconds."""
    steps = round(epochs * math.ceil(len(examples) / config.batch_size))
    schedule = TrainConfig(lr=1.0, steps=steps, warmup=round(0.05 * steps))
    optimizer = torch.optim.AdamW([dict(params=params, lr=lr, peak=lr) for params, lr in groups], weight_decay=0.0)
    generator, order, began = torch.Generator().manual_seed(config.seed), [], time.perf_counter()
    bar = tqdm(range(steps), desc=label, unit="step", disable=None)
    for step in bar:
        if not order:
            order = list(torch.randperm(len(examples), generator=generator).split(config.batch_size))
        loss = step_loss([examples[i] for i in order.pop(0)])
        if loss.requires_grad:
            loss.backward()
        for group in optimizer.param_groups:
            group["lr"] = group["peak"] * learning_rate(step, schedule)
            torch.nn.utils.clip_grad_norm_(group["params"], 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if step % 10 == 0 or step == steps - 1:                                           # reading it waits for a GPU
            bar.set_postfix(loss=f"{loss.item():.3f}")
            if not loss.isfinite():
                raise ValueError(f"{label}: the loss is {loss.item()} at step {step}: lower the learning rate")
    return time.perf_counter() - began


@torch.no_grad()
def imitate(model, ids, mask, learn=False, loss=imitation_loss):
    """The teacher reads ids (B, T), and each layer's maps are compared with its weights: (layers, 2), as in the loss.

    The teacher is the swapped model with softmax's output passed on. What a layer reads depends on no map, so with
    `learn` each layer's loss goes backward at once: memory is that of one layer.
    """
    losses, attentions = [], [layer.self_attn for layer in model.model.layers]

    def beside_softmax(attention, hidden_states, position_embeddings, **kwargs):
        q, k, _ = attention.rotated(hidden_states, position_embeddings)
        with torch.set_grad_enabled(learn):
            both = torch.stack(compare(attention.hybrid or attention, q, k, loss, mask.bool()))
            if learn:
                both[0].backward()
        losses.append(both.detach())
        return LlamaAttention.forward(attention, hidden_states, position_embeddings, **kwargs)

    try:
        for attention in attentions:
            attention.forward = partial(beside_softmax, attention)
        model.model(input_ids=ids, attention_mask=mask, use_cache=False)
    finally:
        for attention in attentions:
            del attention.forward                                                         # its class's is there again
    return torch.stack(losses)


def distill(model, examples, config, device):
    """Stage 1: train the maps of a swapped model, in place. Returns seconds."""
    learn_maps_alone(model.eval())
    # Layers are problems of their own, also in clipping.
    groups = [(maps_of(layer).values(), config.distill_lr) for layer in model.model.layers]
    loss = torch.compile(imitation_loss, dynamic=True) if config.compile else imitation_loss

    def step_loss(batch):
        return imitate(model, *pad([x["ids"] for x in batch], False, device), learn=True, loss=loss)[:, 0].mean()

    return fit(groups, examples, config.distill_epochs, config, "distilling", step_loss)


def divergence(model, examples, config, device):
    """KL of each layer's linear weights from softmax's, in nats a query: the mean over queries and heads."""
    total = 0
    for i in range(0, len(examples), config.batch_size):
        ids, mask = pad([x["ids"] for x in examples[i:i + config.batch_size]], False, device)
        cross_entropy, entropy = imitate(model, ids, mask).T
        total += (cross_entropy - entropy).cpu() * mask.sum().item()
    return (total / sum(len(x["ids"]) for x in examples)).tolist()


def summary_loss(model, device, examples):
    """Mean cross-entropy of the tokens past each prompt (a summary and its end); logits are formed for no others."""
    ids, mask = pad([x["ids"] for x in examples], False, device)
    x = model.model(input_ids=ids, attention_mask=mask, use_cache=False)[0]               # (B, T, C)
    n_prompt = torch.tensor([[x["n_prompt"]] for x in examples], device=device)
    learned = ((torch.arange(ids.shape[1], device=device) >= n_prompt) & mask.bool())[:, 1:]
    return F.cross_entropy(model.lm_head(x[:, :-1][learned]).float(), ids[:, 1:][learned])


def finetune(model, examples, config, device, text=()):
    """Stage 2: low-rank updates of q, k, v and o learn the text if there is one, then the summaries, and are added to
    the weights. Returns seconds."""
    torch.manual_seed(config.seed)
    lora = peft.get_peft_model(model, peft.LoraConfig(
        r=config.rank, lora_alpha=config.alpha, target_modules=["q_proj", "k_proj", "v_proj", "o_proj"]))
    groups = [([p for p in lora.parameters() if p.requires_grad], config.lora_lr)]
    if config.map_lr and maps_of(model):
        groups.append(([p.requires_grad_() for p in maps_of(model).values()], config.map_lr))
    if config.gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=dict(use_reentrant=False))
    model.train(config.gradient_checkpointing)  # what switches it on; there is no dropout
    loss = partial(summary_loss, model, device)
    seconds = fit(groups, text, 1, config, "LoRA, text", loss) if text else 0.0
    seconds += fit(groups, examples, config.lora_epochs, config, "LoRA", loss)
    lora.merge_and_unload()
    model.eval()
    return seconds


# ---------------------------------------------------------------------------------------------------------------------
# What is measured


@torch.no_grad()
def summarize(model, tokenizer, examples, config, device):
    """The likeliest summary of each prompt, token by token. Prompts of one length are written together."""
    end, texts = tokenizer.eos_token_id, [""] * len(examples)
    order = sorted(range(len(examples)), key=lambda i: -len(examples[i]["ids"]))
    for start in tqdm(range(0, len(order), config.generate_batch), desc="writing", unit="batch", disable=None):
        batch = order[start:start + config.generate_batch]
        ids, mask = pad([examples[i]["ids"] for i in batch], True, device, end)
        written = model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=config.max_new_tokens,
                                 do_sample=False, eos_token_id=end, pad_token_id=end)[:, ids.shape[1]:]
        for i, tokens in zip(batch, written.tolist()):
            texts[i] = tokenizer.decode(tokens, skip_special_tokens=True).strip()
    return texts


@torch.no_grad()
def text_perplexity(model, ids, device):
    """Perplexity a token over the whole text, in blocks that do not overlap: each token has the past of its block."""
    ids, total = torch.tensor([ids], device=device), 0.0
    for start in tqdm(range(0, ids.shape[1] - 1, BLOCK), desc="reading", unit="block", disable=None):
        block = ids[:, start:start + BLOCK + 1]
        logits = model(input_ids=block[:, :-1], use_cache=False).logits[0].float()
        total += F.cross_entropy(logits, block[0, 1:], reduction="sum").item()
    return perplexity(total / (ids.shape[1] - 1))


@torch.no_grad()
def speed(model, length, config, device):
    """(tokens a second, peak GiB on a GPU) of generation after `length` tokens, whatever they say. None: no memory."""
    generator, times = torch.Generator().manual_seed(0), []
    ids = torch.randint(model.config.vocab_size, (config.speed_batch, length), generator=generator).to(device)

    def note_time(input_ids, scores, **kwargs):  # asked after each token whether to stop
        if not times:
            reset_peak(device)  # what the past takes, not the prompt
        input_ids.cpu()  # waits for a GPU
        times.append(time.perf_counter())
        return torch.zeros(len(input_ids), dtype=torch.bool, device=device)

    try:  # in pieces, and so with a mask: without one, grouped queries in float32 have no kernel but all (T, T) weights
        model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=SPEED_TOKENS, do_sample=False,
                       min_new_tokens=SPEED_TOKENS, pad_token_id=0, stopping_criteria=[note_time],
                       prefill_chunk_size=BLOCK)
    except torch.OutOfMemoryError:  # a result as well, and no reason to lose the row
        return None, None
    return config.speed_batch / torch.tensor(times, dtype=torch.float64).diff().median().item(), peak_gib(device)


# ---------------------------------------------------------------------------------------------------------------------
# The table


def load(config, kind, **options):
    """What `kind`, a class of transformers, reads of --model, on the CPU; it dequantizes a GGUF file itself."""
    path = Path(config.model)
    if path.suffix == ".gguf":
        if find_spec("gguf") is None:
            raise ValueError(f"--model {path} is read with gguf: pip install -r requirements-experiments.txt")
        path, options = path.parent, options | dict(gguf_file=path.name)
    with or_say(f"no Llama with a tokenizer at --model {config.model}: give a folder with config.json, a .gguf file or "
                "a name on the hub"):
        return kind.from_pretrained(str(path), **options)


def prepare(config, tokenizer):
    """The table's data as tokens, and how they were chosen."""
    splits = read_samsum(config.data)
    trained_on, limit, length = "train" if "train" in splits else "val", config.limit or None, config.max_length
    test_rows = splits["test"][:limit]
    train = [encode(tokenizer, row, length) for row in splits[trained_on][:limit]]
    test = [encode(tokenizer, row, length, with_summary=False) for row in test_rows]
    data = dict(test=test, test_rows=test_rows, text=read_text(config.text, tokenizer, "--text"),
                distill=train + blocks(config.distill_text, tokenizer, "--distill-text", length),
                train=train, lora_text=blocks(config.lora_text, tokenizer, "--lora-text", length),
                kl=[encode(tokenizer, row, length) for row in test_rows[:KL_ROWS]])
    return data, dict(trained_on=trained_on, train_rows=len(train), test_rows=len(test),
                      cut=sum(x["cut"] for x in train + test))


def measure_row(name, model, tokenizer, data, config, device):
    """Convert, finetune, summarize: the row of one attention."""
    row = dict(attention=name)
    if name == "zero-shot" and data["text"]:  # tells whether the weights were read as they were meant
        row["text_first_block_ppl"] = text_perplexity(model, data["text"][:BLOCK], device)
        tqdm.write(f"perplexity of the first {BLOCK:,} tokens of the text: {row['text_first_block_ppl']:.2f}")
    if name in (*MAPS, "window"):
        swap(model, name, config.hybrid_window)
        if name in MAPS:  # the window alone is infinitely far from softmax, and has nothing to learn
            row["kl_before"] = divergence(model, data["kl"], config, device)
        if name in MAPS and config.distill_epochs and maps_of(model):
            reset_peak(device)
            own = config.distill_lr_t2r if name == "t2r" else None
            rate = row["distill_rate"] = config.distill_lr if own is None else own
            row["distill_seconds"] = distill(model, data["distill"], replace(config, distill_lr=rate), device)
            row["distill_gib"], row["kl"] = peak_gib(device), divergence(model, data["kl"], config, device)
        if data["text"]:
            row["distilled_text_ppl"] = text_perplexity(model, data["text"], device)
    if name != "zero-shot" and config.lora_epochs:
        reset_peak(device)
        row["lora_seconds"] = finetune(model, data["train"], config, device, data["lora_text"])
        row["lora_gib"] = peak_gib(device)
    if data["text"]:
        row["text_ppl"] = text_perplexity(model, data["text"], device)
    began = time.perf_counter()
    summaries = summarize(model, tokenizer, data["test"], config, device)
    row["generate_seconds"] = time.perf_counter() - began
    row |= rouge([x["summary"] for x in data["test_rows"]], summaries)
    row["samples"] = [dict(x, written=text) for x, text in zip(data["test_rows"][:3], summaries)]
    measured = {str(n): speed(model, n, config, device) for n in config.generate_lengths if n}
    row["tokens_per_second"] = {n: tokens for n, (tokens, _) in measured.items()}
    row["generate_gib"] = {n: gib for n, (_, gib) in measured.items()}
    return row


def main(config):
    device, dtype, why = pick_device(config.device, config.dtype)
    settings = {k: Path(v).name if k in PATHS else v for k, v in asdict(config).items() if k not in MAY_DIFFER}
    of_t2r, out = dict(distill_lr_t2r=config.distill_lr_t2r), ready(config.out)
    rows_so_far(out, of_t2r, lambda row: row["attention"] == "t2r")
    rows = rows_so_far(out, settings, hybrid_window=0)
    lacking = [name for name in ("zero-shot", *config.attentions) if name not in {row["attention"] for row in rows}]
    if not lacking:
        tqdm.write(f"{out} has all these rows already, nothing is trained: choose another --out to make them again")
        return print(table(rows))
    tokenizer = load(config, transformers.AutoTokenizer)
    data, about = prepare(config, tokenizer)  # what is missing is told before a model of 13 GB is read
    model = load(config, transformers.AutoModelForCausalLM, dtype=dtype or torch.float32).eval()
    llama_layers(model)
    tqdm.write(f"{config.model} on {why}\ntrained on {about['train_rows']} dialogues of SAMSum's {about['trained_on']} "
               f"split, tested on {about['test_rows']} of test; {about['cut']} cut at {config.max_length} tokens")
    about |= provenance(device) | dict(weights=str(model.dtype))
    about["command"] = with_names(about["command"])
    for name in lacking:
        row = measure_row(name, copy.deepcopy(model).to(device), tokenizer, data, config, device)
        rows.append(row | about | settings | (of_t2r if name == "t2r" else {}))
        save_json(out, rows)                                                              # a stopped run keeps its rows
        tqdm.write(f"{name}: ROUGE-1 {row['rouge1']:.1f}")
    print(table(rows))


def table(rows):
    """"/ softmax": ROUGE-1 and the text's perplexity to those of softmax + LoRA. GiB: the most that training took, and
    behind the tokens a second what generation took. Below, what each wrote of the same dialogues."""
    def show(*numbers):
        return ["-" if x is None or math.isnan(x) else f"{x:,.2f}" for x in numbers]

    lengths = list(dict.fromkeys(n for row in rows for n in row["tokens_per_second"]))
    form = ("{:20}" + " {:>9}" * 9 + " {:>18}" * len(lengths)).format
    window = rows[0].get("hybrid_window")
    lines = [form(f"hybrid window {window}" if window else "", "R1", "R2", "RL", "/ softmax", "paper's", "text ppl",
                  "/ softmax", "seconds", "GiB", *(f"tok/s, GiB@{n}" for n in lengths))]
    best = next((row for row in rows if row["attention"] == "softmax"), {})
    for row in rows:
        seconds = sum(row.get(f"{stage}_seconds", 0) for stage in ("distill", "lora", "generate"))
        ppl, paper = row.get("text_ppl", math.nan), PAPER.get(row["attention"], math.nan) / PAPER["softmax"]
        gib = max((row.get(f"{stage}_gib") or 0 for stage in ("distill", "lora"))) or None
        numbers = show(row["rouge1"], row["rouge2"], row["rougeL"], row["rouge1"] / (best.get("rouge1") or math.nan),
                       paper, ppl, ppl / best.get("text_ppl", math.nan), seconds, gib)
        speeds = (show(row["tokens_per_second"].get(n), row["generate_gib"].get(n)) for n in lengths)
        lines.append(form(row["attention"] + " + LoRA" * ("lora_seconds" in row), *numbers, *map(", ".join, speeds)))
    for i, x in enumerate(rows[0]["samples"]):
        lines += [f"\ndialogue {x['id']}", f"  {'a person':13}{x['summary']}"]
        lines += [f"  {row['attention']:13}{' '.join(row['samples'][i]['written'].split())}" for row in rows]
    return "\n".join(lines)


if __name__ == "__main__":
    cli(lambda: main(parse_config(LlamaConfig)),
        out_of_memory="lower --batch-size, --generate-batch or --speed-batch, or add --gradient-checkpointing")
