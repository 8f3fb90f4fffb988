"""SAMSum, dialogues and their summaries: the files, a dialogue (or any text) as tokens to learn, and ROUGE."""

import csv
import io
import json
from pathlib import Path

import torch
from rouge_score.rouge_scorer import RougeScorer

ASK = "Summarize this dialogue in one or two sentences."


def read_samsum(folder):
    """{"train" or "val", "test": rows of id, dialogue and summary} from CSV, JSON or JSON-lines files."""
    splits = {path.stem.removesuffix("idation"): read_rows(path) for path in sorted(Path(folder).glob("*.*"))
              if path.stem in ("train", "val", "validation", "test") and path.suffix in (".csv", ".json", ".jsonl")}
    splits = {split: rows for split, rows in splits.items() if rows}
    if "test" not in splits or len(splits) == 1:
        raise ValueError(f"the folder {folder} has to hold SAMSum's test split and train or val, as CSV or JSON with "
                         f"the columns id, dialogue and summary; found {', '.join(splits) or 'neither'}: mend --data")
    return splits


def read_rows(path):
    try:
        text = path.read_bytes().decode("utf-8-sig")
        if path.suffix == ".csv":
            rows = csv.DictReader(io.StringIO(text, newline=""))
        else:  # a list, or an object a line
            rows = json.loads(text if text.lstrip().startswith("[") else f"[{','.join(text.strip().split(chr(10)))}]")
        rows = [{name: str(row[name]).replace("\r\n", "\n").strip() for name in ("id", "dialogue", "summary")}
                for row in rows]
    except (ValueError, LookupError, TypeError, csv.Error) as e:
        raise ValueError(f"{path} is damaged, or lacks one of the columns id, dialogue and summary ({e!r})") from None
    return [row for row in rows if row["dialogue"] and row["summary"]]                    # one of SAMSum's is empty


def encode(tokenizer, row, max_length, with_summary=True):
    """{"ids", "n_prompt", "cut"}: a prompt in the model's own chat template, or plain if it has none, and the summary
    to be learned. A long dialogue loses its end."""
    def tokens(text, special=False):
        return tokenizer(text, add_special_tokens=special).input_ids

    def prompt_of(dialogue):
        ask = f"{ASK}\n\n{dialogue}"
        if not tokenizer.chat_template:
            return tokens(f"{ask}\n\nSummary:", special=True)
        turn = [dict(role="user", content=ask)]
        return tokens(tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True))

    summary = row["summary"] if tokenizer.chat_template else " " + row["summary"]
    answer = tokens(summary) + [tokenizer.eos_token_id] if with_summary else []
    prompt, words, cut = prompt_of(row["dialogue"]), tokens(row["dialogue"]), False
    while (excess := len(prompt) + len(answer) - max_length) > 0:
        if not words:
            raise ValueError(f"--max-length {max_length} is too short: a prompt without any dialogue and its summary "
                             f"take {len(prompt) + len(answer)} tokens")
        words, cut = words[:-excess], True
        prompt = prompt_of(tokenizer.decode(words))
    return dict(ids=prompt + answer, n_prompt=len(prompt), cut=cut)


def read_text(path, tokenizer, flag):
    """The tokens of the text file that a flag names; none if `path` is empty."""
    if not path:
        return []
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeError) as e:
        raise ValueError(f"{flag} {path} cannot be read as text in UTF-8 ({e}): give another file") from None
    ids = tokenizer(text, add_special_tokens=False, verbose=False).input_ids
    if len(ids) < 2:
        raise ValueError(f"{flag} {path} is too short to predict a token of it ({len(ids)} in all): give a longer text")
    return ids


def blocks(path, tokenizer, flag, length):
    """A text file as examples of `length` tokens, of which all but the first are to be learned."""
    ids = read_text(path, tokenizer, flag)
    return [dict(ids=ids[i:i + length], n_prompt=1) for i in range(0, len(ids) - 1, length)]


def pad(sequences, left, device, fill=0):
    """Lists of tokens -> ids and mask (B, T), padded on the left to generate after them, else on the right."""
    T = max(map(len, sequences))
    ids = torch.full((len(sequences), T), fill)
    mask = torch.zeros_like(ids)
    for i, tokens in enumerate(sequences):
        where = slice(T - len(tokens), T) if left else slice(len(tokens))
        ids[i, where], mask[i, where] = torch.tensor(tokens), 1
    return ids.to(device), mask.to(device)


def rouge(references, summaries):
    """{"rouge1", "rouge2", "rougeL"}: mean F1 in percent, words stemmed, as summaries of SAMSum are usually scored."""
    names = ("rouge1", "rouge2", "rougeL")
    scorer = RougeScorer(names, use_stemmer=True)
    scores = [scorer.score(reference, summary) for reference, summary in zip(references, summaries)]
    return {name: 100 * sum(score[name].fmeasure for score in scores) / len(scores) for name in names}
