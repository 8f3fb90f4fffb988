"""experiments/convert_bert.py on tiny random BERTs, and data/glue.py on tiny files. No network, no download."""

import copy
import json
import math
import multiprocessing.pool
import pickle
import sys
import types
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

transformers = pytest.importorskip("transformers", reason="pip install -r requirements-experiments.txt")
pytest.importorskip("sklearn", reason="pip install -r requirements-experiments.txt")
pytest.importorskip("scipy", reason="pip install -r requirements-experiments.txt")

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "experiments")]

import convert_bert
from convert_bert import BertConfig, restore, swap, visible_keys
from convert_gpt2 import imitation_loss, maps_of
from data import glue
from hedgehog import FEATURE_MAPS, attention_weights
from train_gpt import cli, parse_config

WORDS = "the cat dog sat ran on a mat rug and fast slow no yes".split()
SHAPE = dict(vocab_size=40, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24,
             max_position_embeddings=40, num_labels=3)


def bert(kind=None, seed=0, attn="sdpa", **changes):
    torch.manual_seed(seed)
    config = transformers.BertConfig(**SHAPE | changes, attn_implementation=attn)
    model = transformers.BertForSequenceClassification(config).double().eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.3 * torch.randn_like(p))  # a random BERT is nearly constant
    if kind:
        swap(model, kind)
        with torch.no_grad():
            for p in maps_of(model).values():
                p.add_(0.5 * torch.randn_like(p))
    return model


def padded(rows, left=False, to=12):
    """Inputs of a BERT: the rows, padded with a word that must not matter, and the positions of their words."""
    ids, mask, positions = torch.full((len(rows), to), 7), torch.zeros(len(rows), to).long(), torch.zeros(len(rows), to)
    for i, row in enumerate(rows):
        where = slice(to - len(row), to) if left else slice(0, len(row))
        ids[i, where], mask[i, where], positions[i, where] = torch.tensor(row), 1, torch.arange(len(row)).float()
    return dict(input_ids=ids, attention_mask=mask, position_ids=positions.long())


ROWS = [[3, 5, 8, 9, 11], [4, 6], [2, 13, 9, 9, 21, 30, 1, 5]]


# ---------------------------------------------------------------- the attention


@pytest.mark.parametrize("attn", ["sdpa", "eager"])
@pytest.mark.parametrize("kind", FEATURE_MAPS)
def test_a_padded_batch_gives_the_logits_of_each_row_alone(kind, attn):
    model = bert(kind, attn=attn)
    alone = [model(input_ids=torch.tensor([row])).logits[0] for row in ROWS]
    torch.testing.assert_close(model(**padded(ROWS)).logits, torch.stack(alone), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("left", [False, True])
@pytest.mark.parametrize("kind", ["hedgehog", "t2r", "cosformer"])
def test_padding_on_either_side_changes_no_word(kind, left):
    encoder = bert(kind).bert
    together = encoder(**padded(ROWS, left)).last_hidden_state
    for row, found in zip(ROWS, together):
        alone = encoder(input_ids=torch.tensor([row])).last_hidden_state[0]
        found = found[-len(row):] if left else found[:len(row)]
        torch.testing.assert_close(found, alone, rtol=1e-10, atol=1e-10)
        # BERT's pooler reads place 0, with softmax as well: on the left it must be shown the first word.
        torch.testing.assert_close(encoder.pooler(found[None]), encoder.pooler(alone[None]), rtol=1e-10, atol=1e-10)


def test_the_attention_is_the_explicit_sum_over_words():
    model = bert("hedgehog")
    attention = model.bert.encoder.layer[1].attention.self
    x, keep = torch.randn(3, 9, 16, dtype=torch.float64), torch.rand(3, 9) > 0.3
    y, _ = attention(x, keep[:, None, None])
    for b in range(3):
        for h in range(2):
            q, k, v = (project(x[b])[:, 8 * h:8 * h + 8] for project in
                       (attention.query, attention.key, attention.value))
            phi = [torch.cat(((u @ m.weight[h]).softmax(-1), (-u @ m.weight[h]).softmax(-1)), -1)
                   for u, m in ((q, attention.map_q), (k, attention.map_k))]
            for t in range(9):
                weights = torch.stack([phi[0][t] @ phi[1][s] * keep[b, s] for s in range(9)])
                expected = (weights / weights.sum()) @ v
                torch.testing.assert_close(y[b, t, 8 * h:8 * h + 8], expected, rtol=1e-9, atol=1e-12)


def test_rows_that_are_all_padding_are_finite_and_have_finite_gradients():
    model = bert("hedgehog")
    inputs = padded(ROWS)
    inputs["attention_mask"][1] = 0
    model(**inputs).logits.sum().backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("attn", ["sdpa", "eager"])
@pytest.mark.parametrize("kind", FEATURE_MAPS)
def test_swapping_back_restores_the_logits_to_the_bit(kind, attn):
    model, inputs = bert(attn=attn), padded(ROWS)
    before, names = model(**inputs).logits, list(model.state_dict())
    swap(model, kind)
    assert not torch.equal(model(**inputs).logits, before)
    assert set(names) | set(maps_of(model)) == {n for n in model.state_dict() if "projection" not in n}
    twin = copy.deepcopy(model)
    model.train()
    model.eval()  # the swapped-out modules must hear of it too, or their dropout stays on
    for m in (model, twin):
        assert torch.equal(restore(m)(**inputs).logits, before) and list(m.state_dict()) == names


def test_dropout_of_the_softmax_that_comes_back_is_that_of_the_model():
    model = swap(bert().train())
    model.eval()
    restore(model)
    assert not any(m.training for m in model.modules())


def test_what_is_learned_while_swapped_is_kept():
    model, inputs = bert("hedgehog"), padded(ROWS)
    before = restore(copy.deepcopy(model))(**inputs).logits
    with torch.no_grad():
        model.bert.encoder.layer[0].attention.self.query.weight.mul_(2)
    assert not torch.allclose(restore(model)(**inputs).logits, before)


def test_gradients_are_those_of_finite_differences():
    model = bert("hedgehog")
    attention, mask = model.bert.encoder.layer[0].attention.self, torch.tensor([[1, 1, 1, 0]]).bool()[:, None, None]
    x = torch.randn(1, 4, 16, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: attention(x, mask)[0], (x,))


# ---------------------------------------------------------------- masks


def test_every_form_of_a_padding_mask_is_read_alike():
    keep = torch.tensor([[1, 1, 0], [0, 1, 1]]).bool()
    additive = torch.zeros(2, 1, 1, 3).masked_fill(~keep[:, None, None], torch.finfo(torch.float32).min)
    for mask in (keep, keep.long(), keep.float(), keep[:, None, None], keep[:, None, None].expand(2, 2, 3, 3), additive,
                 additive.expand(2, 1, 3, 3), additive.masked_fill(additive < 0, -math.inf), additive.half(),
                 additive.bfloat16()):
        assert torch.equal(visible_keys(mask, torch.zeros(2, 3, 4)), keep)
    assert visible_keys(None, torch.zeros(2, 3, 4)).tolist() == [[True] * 3] * 2
    assert visible_keys(keep[:1, None, None], torch.zeros(2, 3, 4)).tolist() == [[True, True, False]] * 2


@pytest.mark.parametrize("mask, what", [
    (torch.ones(1, 1, 3, 3).tril().bool(), "the mask is causal"),
    (torch.zeros(1, 1, 3, 3).masked_fill(torch.ones(3, 3).triu(1).bool(), -math.inf), "the mask is causal"),
    (torch.eye(3).bool()[None, None] | torch.tensor([False, False, True]), "different from query to query"),
    (torch.tensor([[True, True, False], [True, False, True]])[None, :, None], "from head to head"),
    (torch.tensor([0.0, -0.5, 0.0])[None, None, None], "a bias on q.k"),
    (torch.ones(1, 4).bool(), "of shape .1, 4., which does not fit 1 rows of 3 tokens"),
    (object(), r'the object of flex_attention, which .*: model.set_attn_implementation\("sdpa"\)'),
    (torch.ones(3, 3).bool()[None], "of shape .1, 3, 3., which does not fit"),
])
def test_other_masks_are_refused_and_named(mask, what):
    with pytest.raises(ValueError, match=what):
        visible_keys(mask, torch.zeros(1, 3, 4))


def test_a_mask_of_its_own_for_each_query_is_refused_by_the_model():
    with pytest.raises(ValueError, match="the mask is causal"):
        bert("hedgehog").bert.encoder(torch.randn(1, 3, 16).double(), torch.ones(1, 1, 3, 3).tril().bool())


def test_a_mask_changed_in_place_is_read_again():
    encoder, mask = bert("hedgehog").bert.encoder, torch.ones(1, 1, 1, 3).bool()
    x = torch.randn(1, 3, 16).double()
    before = encoder(x, mask).last_hidden_state
    mask[..., 2] = False
    after = encoder(x, mask).last_hidden_state[:, :2]
    torch.testing.assert_close(after, encoder(x[:, :2]).last_hidden_state)
    assert not torch.allclose(before[:, :2], after)


# ---------------------------------------------------------------- models that cannot be swapped


def test_only_an_encoder_of_bert_is_swapped():
    other = transformers.DistilBertForSequenceClassification(transformers.DistilBertConfig(
        vocab_size=40, dim=16, n_layers=1, n_heads=2, hidden_dim=24))
    with pytest.raises(ValueError, match="DistilBertForSequenceClassification .distilbert. must be a bert encoder"):
        swap(other)
    with pytest.raises(ValueError, match="must be a bert encoder"):
        swap(bert(is_decoder=True))
    with pytest.raises(ValueError, match="not swapped already"):
        swap(bert("hedgehog"))
    with pytest.raises(ValueError, match="unknown feature map 'hedgehop'"):
        swap(bert(), "hedgehop")
    model = bert()
    model.config._attn_implementation = "flash_attention_2"
    with pytest.raises(ValueError, match="attn_implementation='flash_attention_2': load the model with sdpa or eager"):
        swap(model)
    model = bert()
    model.config.position_embedding_type = "relative_key"
    with pytest.raises(ValueError, match="relative_key"):
        swap(model)


def test_what_the_sum_cannot_honour_is_refused():
    attention, x = bert("hedgehog").bert.encoder.layer[0].attention.self, torch.randn(1, 3, 16).double()
    with pytest.raises(ValueError, match="cannot honour output_attentions"):
        attention(x, output_attentions=True)
    with pytest.raises(ValueError, match="cannot honour encoder_hidden_states"):
        attention(x, None, encoder_hidden_states=x)
    attention(x, None, None, output_attentions=False, position_ids=torch.arange(3))


def test_maps_move_between_models_of_one_shape_alone():
    model, inputs = bert("hedgehog"), padded(ROWS)
    again = swap(bert(), "hedgehog", maps_of(model))
    torch.testing.assert_close(again(**inputs).logits, model(**inputs).logits)
    other = bert(num_attention_heads=4)
    before = other(**inputs).logits
    with pytest.raises(ValueError, match=r"do not fit 2 layers of 4 heads of width 4 with the hedg"):
        swap(other, "hedgehog", maps_of(model))
    assert torch.equal(other(**inputs).logits, before)


# ---------------------------------------------------------------- distillation


def random_heads(T=7, scale=1.0):
    torch.manual_seed(1)
    return [scale * torch.randn(3, 2, T, 4, dtype=torch.float64) for _ in range(2)]


def test_the_loss_is_the_mean_over_words_of_the_explicit_cross_entropy():
    (q, k), keep = random_heads(), torch.tensor([[1] * 7, [1, 1, 1, 0, 0, 0, 0], [0, 0, 0, 1, 1, 1, 1]]).bool()
    phi_q, phi_k = q.softmax(-1), k.softmax(-1)
    loss, entropy = imitation_loss(q, k, phi_q, phi_k, keep, causal=False)
    losses, entropies = [], []
    for b in range(3):
        words = keep[b].nonzero()[:, 0]
        p = (q[b][:, words] @ k[b][:, words].mT / 2).softmax(-1)
        a = attention_weights(phi_q[b:b + 1, :, words], phi_k[b:b + 1, :, words], causal=False)[0]
        losses.append(-(p * a.log()).sum(-1).flatten())
        entropies.append(-(p * p.log()).sum(-1).flatten())
    assert loss.item() == pytest.approx(torch.cat(losses).mean().item(), rel=1e-10)
    assert entropy.item() == pytest.approx(torch.cat(entropies).mean().item(), rel=1e-10)


@pytest.mark.parametrize("scale", [0.0, 1e-30, 1e-18, 1.0, 1e17])
def test_no_features_get_below_the_entropy_with_padding_too(scale):
    q, k = random_heads(scale=3.0)
    for seed in range(5):
        torch.manual_seed(seed)
        phi_q, phi_k = (scale * torch.rand(3, 2, 7, 8) for _ in range(2))
        keep = torch.rand(3, 7) > 0.3
        keep[2] = False  # a row without a token
        loss, entropy = imitation_loss(q, k, phi_q.requires_grad_(True), phi_k.requires_grad_(True), keep, causal=False)
        assert loss.isfinite() and loss >= entropy - 1e-6
        assert all(g.isfinite().all() for g in torch.autograd.grad(loss, (phi_q, phi_k)))


def test_exact_features_reach_the_floor_and_padding_has_no_say():
    (q, k), keep = random_heads(), torch.tensor([[1] * 7, [1] * 4 + [0] * 3, [1] * 2 + [0] * 5]).bool()
    phi_k = torch.eye(7, dtype=torch.float64).expand(3, 2, 7, 7)
    loss, entropy = imitation_loss(q, k, (q @ k.mT / 2).exp(), phi_k, keep, causal=False)
    assert loss.item() == pytest.approx(entropy.item(), abs=1e-12)
    noise = [x.masked_fill(~keep[:, None, :, None], 50.0) for x in (q, k)]
    assert [x.item() for x in imitation_loss(*noise, (q @ k.mT / 2).exp(), phi_k, keep, False)] == pytest.approx(
        [loss.item(), entropy.item()], rel=1e-12)


def test_distillation_computes_what_the_teacher_computes_and_moves_the_maps_alone():
    model, inputs = bert("hedgehog"), padded(ROWS)
    teacher = restore(copy.deepcopy(model))
    seen = []
    model.bert.encoder.register_forward_hook(lambda m, args, y: seen.append(y.last_hidden_state))
    kl = convert_bert.imitate(model, inputs)
    assert torch.equal(seen[0], teacher.bert(**inputs).last_hidden_state)
    kl.backward()
    maps = maps_of(model)
    assert kl > 0 and all(p.grad.abs().sum() > 0 for p in maps.values())
    assert all(p.grad is None for name, p in model.named_parameters() if name not in maps)
    assert model.bert.encoder.layer[0].attention.self.imitates is False
    torch.testing.assert_close(model(**inputs).logits, bert("hedgehog")(**inputs).logits)  # linear again


# ---------------------------------------------------------------- GLUE

LINES = {  # the header, rows as they are in GLUE's files, and what is read of them
    "cola": (None, ['gj04\t1\t\tThe "cat sat.', "gj04\t0\t*\tCat the sat."],
             [(('The "cat sat.',), 1), (("Cat the sat.",), 0)]),
    "sst2": ("sentence\tlabel", [" a fine film \t1", "dull \t0"], [((" a fine film ",), 1), (("dull ",), 0)]),
    "mrpc": ("Quality\t#1 ID\t#2 ID\t#1 String\t#2 String", ['1\t7\t8\tHe "ran.\tHe ran.', "0\t7\t8\tA\tB"],
             [(('He "ran.', "He ran."), 1), (("A", "B"), 0)]),
    "stsb": ("index\tgenre\tfilename\tyear\told_index\tsource1\tsource2\tsentence1\tsentence2\tscore",
             ["0\tg\tf\t2012\t1\tnone\tnone\tA plane.\tAn air plane.\t4.750"], [(("A plane.", "An air plane."), 4.75)]),
    "qqp": ("id\tqid1\tqid2\tquestion1\tquestion2\tis_duplicate", ["1\t2\t3\tHow?\tWhy?\t0", "4\t5\t6\tHow?\tHow?\t1"],
            [(("How?", "Why?"), 0), (("How?", "How?"), 1)]),
    "mnli": ("index\tpromptID\tpairID\tgenre\tsentence1_binary_parse\tsentence2_binary_parse\tsentence1_parse\t"
             "sentence2_parse\tsentence1\tsentence2\tlabel1\tgold_label",
             ["0\t1\t1n\tfiction\tx\tx\tx\tx\tA\tB\tneutral\tneutral",
              "1\t1\t1c\tf\tx\tx\tx\tx\tA\tC\te\tcontradiction"],
             [(("A", "B"), 1), (("A", "C"), 2)]),
    "qnli": ("index\tquestion\tsentence\tlabel", ["0\tWho?\tHe.\tentailment", "1\tWho?\tNo.\tnot_entailment"],
             [(("Who?", "He."), 0), (("Who?", "No."), 1)]),
    "rte": ("index\tsentence1\tsentence2\tlabel", ["0\tA\tB\tnot_entailment"], [(("A", "B"), 1)]),
    "wnli": ("index\tsentence1\tsentence2\tlabel", ["0\tA\tB\t1"], [(("A", "B"), 1)]),
}


@pytest.mark.parametrize("task", glue.TASKS)
@pytest.mark.parametrize("end, mark", [("\n", ""), ("\r\n", "\ufeff")])
def test_rows_of_every_task_are_read(task, end, mark, tmp_path):
    header, lines, rows = LINES[task]
    path = tmp_path / "train.tsv"
    path.write_bytes((mark + end.join(([header] if header else []) + lines) + end).encode())
    assert glue.read_rows(task, path) == rows


def test_cola_is_read_with_two_columns_too(tmp_path):
    (tmp_path / "train.tsv").write_text("the cat sat\t1\nsat the\t0\n")
    assert glue.read_rows("cola", tmp_path / "train.tsv") == [(("the cat sat",), 1), (("sat the",), 0)]


def test_a_damaged_row_is_left_out_and_a_damaged_file_refused(tmp_path, capsys):
    header, lines, rows = LINES["qqp"]
    path = tmp_path / "train.tsv"
    path.write_text("\n".join([header, *lines * 50, "7\t8\thalf a row"]))
    assert glue.read_rows("qqp", path) == rows * 50 and "1 of 101 rows lack a column" in capsys.readouterr().out
    path.write_text("\n".join([header, *lines, "7\t8\thalf a row"]))
    with pytest.raises(ValueError, match="2 of 3 rows have the columns"):
        glue.read_rows("qqp", path)
    path.write_text("")
    for task, what in (("qqp", "must begin with a header that has the columns question1"), ("cola", "0 of 0 rows")):
        with pytest.raises(ValueError, match=what):
            glue.read_rows(task, path)
    path.write_text("index\tsentence1\tsentence2\n0\tA\tB\n")  # the layout of a test.tsv
    with pytest.raises(ValueError, match="must begin with a header"):
        glue.read_rows("rte", path)


def test_measures_are_those_counted_by_hand():
    answers, predicted = np.array([1, 1, 1, 0, 0, 1]), np.array([1, 1, 0, 0, 1, 1])  # TP 3, FP 1, FN 1, TN 1
    assert glue.measure("mrpc", predicted, answers) == pytest.approx(dict(score=0.75, f1=0.75, accuracy=4 / 6))
    assert glue.measure("cola", predicted, answers)["score"] == pytest.approx((3 * 1 - 1 * 1) / (4 * 2))
    assert glue.measure("mnli", np.array([0, 1, 2, 2]), np.array([0, 1, 2, 1])) == dict(score=0.75, accuracy=0.75)
    found = glue.measure("stsb", np.array([1.0, 2.0, 9.0]), np.array([0.0, 4.0, 5.0]))
    pearson = (-3 * -3 + -2 * 1 + 5 * 2) / math.sqrt((9 + 4 + 25) * (9 + 1 + 4))
    assert found == pytest.approx(dict(score=(pearson + 1) / 2, pearson=pearson, spearman=1.0))
    assert glue.measure("stsb", np.ones(3), np.arange(3.0))["score"] == 0
    assert glue.measure("cola", np.ones(3), np.array([1, 0, 1]))["score"] == 0


def test_what_the_folder_lacks_is_downloaded_once(tmp_path, monkeypatch, capsys):
    calls = []

    def fetched(mirrors, path, is_whole, remedy):
        calls.append(mirrors[0])
        if path.suffix == ".zip":
            with zipfile.ZipFile(path, "w") as z:
                for name in ("train", "dev_matched", "dev_mismatched", "test_matched"):
                    z.writestr(f"MNLI/{name}.tsv", name)
        else:
            path.write_text("\ufeffQuality\t...")
        assert is_whole(path)
    monkeypatch.setattr(glue, "download", fetched)
    for _ in range(2):
        train, reported = glue.find_files("mnli", tmp_path)
        assert train.read_text() == "train" and [p.stem for p in reported] == ["dev_matched", "dev_mismatched"]
        assert [p.name for p in glue.find_files("mrpc", tmp_path)[1]] == ["msr_paraphrase_test.txt"]
    originals = ["msr_paraphrase_train.txt", "msr_paraphrase_test.txt"]
    assert [url.rsplit("/", 1)[1] for url in calls] == ["MNLI.zip", *originals]
    for name in ("train.tsv", "dev.tsv"):  # GLUE's own cut is taken where it is
        (tmp_path / "MRPC" / name).write_text("")
    assert glue.find_files("mrpc", tmp_path)[0].name == "train.tsv"


def test_no_data_and_no_network_is_told_in_a_sentence(tmp_path, monkeypatch):
    monkeypatch.setattr(glue, "ARCHIVES", "http://127.0.0.1:9/{}.zip")
    with pytest.raises(ValueError, match="no mirror delivered RTE.zip .* get RTE elsewhere and put its files into"):
        glue.find_files("rte", tmp_path)
    monkeypatch.setattr(glue, "MRPC", "http://127.0.0.1:9/{}")
    for task, data in (("rte", "a/b"), ("mrpc", "a/b"), ("mrpc", "")):
        with pytest.raises(ValueError, match="no mirror delivered"):
            glue.find_files(task, tmp_path / data)
    assert not list(tmp_path.iterdir())  # no empty folder is left
    (tmp_path / "mine").mkdir()
    with pytest.raises(ValueError, match="no mirror delivered"):
        glue.find_files("rte", tmp_path / "mine")
    assert [path.name for path in tmp_path.rglob("*")] == ["mine"]  # which this call did not make
    (tmp_path / "RTE.zip").write_bytes(b"PK")
    with pytest.raises(ValueError, match="RTE.zip is damaged or another archive"):
        glue.find_files("rte", tmp_path)


# ---------------------------------------------------------------- the whole


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A folder with a tiny BERT and tiny tasks."""
    folder = tmp_path_factory.mktemp("world")
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]
    (folder / "bert").mkdir()
    (folder / "bert" / "vocab.txt").write_text("\n".join(vocabulary))
    tokenizer = transformers.BertTokenizer(str(folder / "bert" / "vocab.txt"))
    tokenizer.save_pretrained(folder / "bert")
    bert(vocab_size=len(vocabulary)).float().save_pretrained(folder / "bert")
    draw = np.random.default_rng(0)

    def sentence():
        return " ".join(draw.choice(WORDS, draw.integers(2, 6)))
    for task in ("cola", "mrpc", "stsb", "mnli"):
        about, header = glue.TASKS[task], LINES[task][0]
        (folder / "glue" / about.folder).mkdir(parents=True)
        original = ("msr_paraphrase_train.txt", "msr_paraphrase_test.txt")
        for name in original if task == "mrpc" else ("train.tsv", *about.splits):
            lines = [header] if header else []
            for _ in range(30):
                answer = draw.choice(about.labels) if about.labels else f"{draw.uniform(0, 5):.2f}"
                columns = {about.label: str(answer)} | {column: sentence() for column in about.text}
                lines.append(f"s\t{answer}\t\t{sentence()}" if task == "cola" else
                             "\t".join(columns.get(name, "x") for name in header.split("\t")))
            (folder / "glue" / about.folder / name).write_text("\n".join(lines) + "\n")
    return folder


def given(world, out, *flags):
    return parse_config(BertConfig, argv=[
        "--model", str(world / "bert"), "--data", str(world / "glue"), "--out", str(out / "rows.json"),
        "--device", "cpu", "--max-length", "16", "--batch-size", "8", "--teacher-epochs", "1",
        "--distill-epochs", "1", "--epochs", "1", "--seeds", "0", *flags])


def rows_of(out):
    return {(row["task"], row["attention"]): row for row in json.loads((out / "rows.json").read_text())}


def test_the_whole_table_at_toy_size(world, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["/a/convert_bert.py", "--model", "/b/bert", "--data", "data/glue"])
    convert_bert.main(given(world, tmp_path, "--task", "mrpc", "--seeds", "0", "1"))
    rows, printed = rows_of(tmp_path), capsys.readouterr().out
    assert [key[1] for key in rows] == ["softmax", "hedgehog", "elu", "t2r", "hedgehog-undistilled"]
    softmax, mine = rows["mrpc", "softmax"], rows["mrpc", "hedgehog"]
    assert softmax["recovered"] == 100 and softmax["score"] == max(
        softmax["stages"][stage]["score"] for stage in ("teacher", "finetuned"))
    for row in rows.values():
        assert row["seeds"] == 2 and row["score"] == pytest.approx(np.mean(row["scores"])) and 0 <= row["score"] <= 1
        assert row["std"] == pytest.approx(np.std(row["scores"], ddof=1))
        assert row["recovered"] == pytest.approx(100 * row["score"] / softmax["score"]) and row["accuracy"] <= 1
        assert {"command", "commit", "device", "torch", "transformers", "lr", "limit", "seconds"} <= row.keys()
        assert row["command"] == "python convert_bert.py --model bert --data data/glue"
        assert row["model"] == "bert" and f"{100 * row['score']:.1f}" in printed
    assert list(mine["stages"]) == ["teacher", "swapped", "distilled", "finetuned"]
    assert list(rows["mrpc", "hedgehog-undistilled"]["stages"]) == ["teacher", "swapped", "finetuned"]
    assert all(run["distillation"]["kl"] > 0 and run["teacher"]["epoch"] in (0, 1) for run in mine["runs"])
    assert mine["held_out"] == pytest.approx(np.mean([run["held_out"] for run in mine["runs"]]))


def test_a_model_that_is_finetuned_already_is_taken_as_it_is(world, tmp_path, capsys):
    tokenizer = transformers.AutoTokenizer.from_pretrained(world / "bert")
    model = bert(vocab_size=len(tokenizer), num_labels=2).float()
    for part in (model, tokenizer):
        part.save_pretrained(tmp_path / "finetuned")
    convert_bert.main(given(world, tmp_path, "--model", str(tmp_path / "finetuned"), "--task", "cola", "--attentions",
                            "softmax", "t2r", *"--teacher-epochs 0 --distill-epochs 0 --epochs 0".split()))
    predicted, answers = [], []
    for (sentence,), answer in glue.read_rows("cola", world / "glue" / "CoLA" / "dev.tsv"):
        predicted.append(model(**tokenizer(sentence, return_tensors="pt")).logits.argmax().item())
        answers.append(answer)
    rows, score = rows_of(tmp_path), glue.measure("cola", np.array(predicted), np.array(answers))["score"]
    assert rows["cola", "softmax"]["score"] == score != 0
    assert list(rows["cola", "t2r"]["stages"]) == ["teacher", "swapped", "finetuned"]


def test_softmax_is_given_the_better_of_its_two_means_and_the_others_are_compared_with_it():
    def runs(*scores):
        return [dict(seed=seed, seconds=1, held_out=0.5, stages=dict(
            teacher=dict(score=teacher), finetuned=dict(score=finetuned))) for seed, (teacher, finetuned) in scores]
    softmax = convert_bert.summarize("rte", "softmax", runs((1, (0.6, 0.5)), (0, (0.8, 0.7))), {})
    assert (softmax["score"], softmax["stage"], softmax["scores"]) == (pytest.approx(0.7), "teacher", [0.8, 0.6])
    assert softmax["std"] == pytest.approx(math.sqrt(0.02))
    again = convert_bert.summarize("rte", "softmax", runs((0, (0.5, 0.9)), (1, (0.6, 0.3))), {})
    assert (again["score"], again["stage"]) == (pytest.approx(0.6), "finetuned")
    mine = convert_bert.summarize("rte", "elu", runs((0, (0.8, 0.35))), {})
    assert mine["score"] == 0.35 and mine["std"] is None and mine["seeds"] == 1
    convert_bert.add_recovered(rows := [softmax, mine])
    assert [row["recovered"] for row in rows] == pytest.approx([100, 50])
    assert "35.0      -          50.0" in convert_bert.table([row | dict(task="rte") for row in rows])
    assert "t2r: 50.0 % of softmax recovered, mean of 1; the paper's, over GLUE: 89, probably not distilled" in (
        convert_bert.table([softmax, mine | dict(attention="t2r")]))
    convert_bert.add_recovered([mine])
    assert mine["recovered"] is None  # nothing to compare with


def parts(world, config, task="mrpc"):
    """(a tiny BERT from the disk, its training, held-out and reported rows)."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(config.model)
    model = transformers.BertForSequenceClassification.from_pretrained(config.model, num_labels=2,
                                                                       ignore_mismatched_sizes=True)
    return model, *glue.load_batches(task, config.data, config.limit, tokenizer=tokenizer, batch_size=8, device="cpu",
                                     max_length=config.max_length)


def test_distillation_brings_the_maps_nearer_and_leaves_the_rest(world, tmp_path):
    config = given(world, tmp_path, "--distill-epochs", "4")
    model, train, held_out, _ = parts(world, config)
    swap(model)
    before = {name: p.clone() for name, p in model.state_dict().items()}
    first = convert_bert.faithfulness(model, held_out)
    last = convert_bert.distill(model, train, held_out, config, 0)
    assert 0 <= last["kl"] < 0.9 * first and last["kl"] == convert_bert.faithfulness(model, held_out)
    changed = {name for name, p in model.state_dict().items() if not torch.equal(p, before[name])}
    assert changed == set(maps_of(model)) and all(p.requires_grad for p in model.parameters())


def test_faithfulness_is_the_mean_over_tokens(world, tmp_path):
    config = given(world, tmp_path)
    model, train, held_out, _ = parts(world, config)
    swap(model.eval())
    for rows, size in ((train, 1), (train, 27), (held_out, 3)):
        rows.batch_size = size
    whole = convert_bert.faithfulness(model, train)
    train.batch_size = 1
    assert convert_bert.faithfulness(model, train) == pytest.approx(whole, rel=1e-5) and whole > 0


@pytest.mark.parametrize("task", ["stsb", "mnli", "cola"])
def test_numbers_two_splits_and_single_sentences_take_part(task, world, tmp_path, capsys):
    convert_bert.main(given(world, tmp_path, "--task", task, "--attentions", "softmax", "hedgehog", "--limit", "20"))
    row = rows_of(tmp_path)[task, "hedgehog"]
    names = dict(stsb={"pearson", "spearman"}, cola={"matthews"}, mnli={"accuracy"})[task]
    assert row["score"] == pytest.approx(sum(row[name] for name in names) / len(names))
    assert (row["train_rows"], row["reported_rows"]) == (20, 40 if task == "mnli" else 20)  # one held out included


def test_an_interrupted_run_goes_on_where_it_stopped(world, tmp_path, monkeypatch, capsys):
    flags, real, jobs = ("--task", "mrpc", "cola", "--attentions", "softmax", "elu"), convert_bert.convert, []

    def stops(job, config):
        jobs.append(job)
        if len(jobs) == 2:
            raise KeyboardInterrupt
        return real(job, config)
    monkeypatch.setattr(convert_bert, "convert", stops)
    with pytest.raises(KeyboardInterrupt):
        convert_bert.main(given(world, tmp_path, *flags))
    kept = rows_of(tmp_path)
    convert_bert.main(given(world, tmp_path, *flags))
    both = ["softmax", "elu"]
    assert jobs == [("mrpc", 0, both), ("cola", 0, both), ("cola", 0, both)]
    assert {key: rows_of(tmp_path)[key] for key in kept} == kept and len(kept) == 2
    # Another seed and another attention join the rows.
    convert_bert.main(given(world, tmp_path, *flags, "t2r", "--seeds", "0", "1", "--task", "mrpc"))
    assert jobs[3:] == [("mrpc", 0, ["t2r"]), ("mrpc", 1, [*both, "t2r"])]
    assert "nothing is trained" not in capsys.readouterr().out
    convert_bert.main(given(world, tmp_path, *flags))
    assert len(jobs) == 5 and "rows.json has all these rows already, nothing is trained" in capsys.readouterr().out
    assert [(row["task"], row["attention"], row["seeds"]) for row in rows_of(tmp_path).values()] == [
        ("cola", "softmax", 1), ("cola", "elu", 1), ("mrpc", "softmax", 2), ("mrpc", "elu", 2), ("mrpc", "t2r", 2)]
    with pytest.raises(ValueError, match="holds rows made with --lr 0.0001: give the same --lr, or"):
        convert_bert.main(given(world, tmp_path, *flags, "--lr", "1e-3"))


def test_several_workers_make_the_rows_of_one(world, tmp_path, capsys, monkeypatch):
    """Real processes take ten seconds to start: a thread stands in for them, behind a pickle."""
    class Pool(multiprocessing.pool.ThreadPool):
        def __init__(self, processes, *_):
            assert processes == 2
            super().__init__(1)

        def imap_unordered(self, function, jobs):
            return reversed([*super().imap_unordered(pickle.loads(pickle.dumps(function)), jobs)])
    monkeypatch.setattr(multiprocessing, "get_context", lambda kind: types.SimpleNamespace(Pool=Pool))
    found = []
    for flags in ((), ("--workers", "2")):
        convert_bert.main(given(world, tmp_path, "--task", "mrpc", "--attentions", "softmax", "--seeds", "0", "1",
                                *flags))
        found.append([run | dict(seconds=0) for run in rows_of(tmp_path)["mrpc", "softmax"]["runs"]])
        (tmp_path / "rows.json").unlink()
    assert found[0] == found[1] and [run["seed"] for run in found[0]] == [0, 1]


def test_a_run_is_the_same_every_time_and_every_attention_starts_from_the_same_teacher(world, tmp_path):
    config = given(world, tmp_path, "--lr", "3e-3", "--epochs", "3")
    runs = [convert_bert.convert(("stsb", seed, attentions), config)
            for seed, attentions in ((0, ["elu", "hedgehog"]), (0, ["hedgehog"]), (1, ["hedgehog"]))]
    first, second = (found["stsb", "hedgehog", 0] | dict(seconds=0) for found in runs[:2])
    assert runs[0]["stsb", "elu", 0]["epoch"] > 0  # its weights are no longer the teacher's
    assert first == second and first["stages"]["teacher"] == runs[0]["stsb", "elu", 0]["stages"]["teacher"]
    assert runs[2]["stsb", "hedgehog", 1]["distillation"]["kl"] != first["distillation"]["kl"]  # the seed is heard


def test_the_best_epoch_is_chosen_and_a_stage_ends_when_it_is_long_ago(world, tmp_path):
    config = given(world, tmp_path, "--epochs", "6", "--patience", "2", "--lr", "3e-3")
    model, train, *_ = parts(world, config)
    values, weights, modes = iter([0.1, 0.5, 0.4, 0.6, 0.2, 0.3, 0.9]), [], []

    def value():
        weights.append(model.classifier.weight.detach().clone())
        model.eval()
        return next(values)

    def loss(batch):
        modes.append(model.training)
        return model(**batch).loss
    best = convert_bert.fit(model.train(), train, config, 0, "", loss, value, [list(model.parameters())])
    assert best == (3, 0.6) and torch.equal(model.classifier.weight, weights[3]) and len(weights) == 6
    assert all(modes) and not torch.equal(weights[3], weights[4])


def test_held_out_rows_are_no_training_rows_and_batches_hold_every_row_once(world, tmp_path):
    config = given(world, tmp_path)
    _, train, held_out, reported = parts(world, config)
    assert [len(part.rows) for part in (train, held_out, reported)] == [27, 3, 30]
    texts = [[(*row["input_ids"],) for row in part.rows] for part in (train, held_out)]
    assert len({*texts[0], *texts[1]}) == len({*texts[0]}) + len({*texts[1]})
    seen, composed = [], []
    for rng in (None, np.random.default_rng(0), np.random.default_rng(1)):
        rows = []
        for batch in train.draw(rng):
            mask, ids = batch["attention_mask"].bool(), batch["input_ids"]
            assert ids.shape[1] == -(-mask.sum(1).max() // 8) * 8 and not ids[~mask].any()
            rows.append([(*row[m].tolist(), label.item()) for row, m, label in zip(ids, mask, batch["labels"])])
        assert [len(those) for those in rows].count(8) == 3
        seen.append(sorted(sum(rows, [])))
        composed.append({frozenset(those) for those in rows})
    assert seen == [sorted((*row["input_ids"], row["labels"]) for row in train.rows)] * 3
    assert composed[1] != composed[2]  # not the same batches in another order
    second = [sum(row["token_type_ids"]) for row in train.rows]
    assert all(0 < n < len(row["input_ids"]) for n, row in zip(second, train.rows))  # it is marked as one
    short, *_ = parts(world, given(world, tmp_path, "--max-length", "8"))[1:]
    assert short.lengths.max() == 8
    assert [len(batches) for batches in (train, held_out, reported)] == [4, 1, 4]


@pytest.mark.parametrize("flags, what", [
    (("--batch-size", "0"), "--batch-size must be at least 1"),
    (("--seeds", "-1"), "--seeds must be at least 0"),
    (("--model", "./no/such/folder"), "no BERT with a tokenizer at --model ./no/such/folder: give a folder"),
    (("--out", "/dev/null/rows.json"), "cannot write --out /dev/null/rows.json: choose another"),
    (("--limit", "1"), "too few to hold one out: raise --limit"),
    (("--teacher-lr", "1e30"), "is not finite after epoch 1: lower --teacher-lr"),
])
def test_bad_input_is_told_in_a_sentence(flags, what, world, tmp_path, capsys):
    with pytest.raises(SystemExit):
        cli(lambda: convert_bert.main(given(world, tmp_path, "--task", "cola", "--attentions", "softmax", *flags)))
    told = capsys.readouterr().err
    assert what in told and "free some space" not in told


def test_a_wrong_model_is_told_before_data_is_downloaded(world, tmp_path, monkeypatch):
    monkeypatch.setattr(glue, "find_files", lambda *args: pytest.fail("looks for data first"))
    with pytest.raises(ValueError, match="no BERT with a tokenizer at --model"):
        convert_bert.main(given(world, tmp_path, "--model", str(tmp_path / "nowhere")))


def test_another_architecture_and_a_missing_package_are_told(world, tmp_path, monkeypatch):
    tokenizer = transformers.AutoTokenizer.from_pretrained(world / "bert")
    other = transformers.RobertaForSequenceClassification(transformers.RobertaConfig(**SHAPE))
    for part in (other, tokenizer):
        part.save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match="RobertaForSequenceClassification .roberta. must be a bert encoder"):
        convert_bert.main(given(world, tmp_path, "--model", str(tmp_path / "other")))
    monkeypatch.setattr(convert_bert, "missing", "peft")
    with pytest.raises(ValueError, match="needs peft: pip install -r requirements-experiments.txt"):
        convert_bert.main(given(world, tmp_path))


def test_several_seeds_are_several_values_of_one_flag():
    config = parse_config(BertConfig, argv=["--seeds", "3", "5", "--task", "rte"])
    assert list(config.seeds) == [3, 5] and list(config.task) == ["rte"]
    assert parse_config(BertConfig, argv=[]).seeds == (0, 1, 2)


def test_the_defaults_touch_no_committed_rows():
    assert BertConfig().out == "runs/bert.json"
