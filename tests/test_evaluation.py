"""Both protocols equal the plain reading of them: one sequence at a time, all logits, no tricks."""

from dataclasses import replace

import pytest
import torch

from dora_lab.data import load_examples, tokenized
from dora_lab.evaluation import Prediction, accuracy, accuracy_by_task, as_row, generate, likelihood, per_token
from dora_lab.models import load_base
from dora_lab.tasks import ANSWER_PREFIX, Example, prompt

TEMPLATE = "alpaca-short"


@pytest.fixture(scope="module")
def base(tiny_base):
    return load_base(str(tiny_base))


@pytest.fixture(scope="module")
def questions(tiny_data):
    return load_examples(str(tiny_data), "boolq", "test") + load_examples(str(tiny_data), "hellaswag", "test")


@pytest.fixture(scope="module")
def mixed(questions):
    """One-token and several-token candidates, of equal and of differing lengths, one a beginning of another."""
    instruction = questions[0].instruction
    several = [
        Example("a", instruction, "very heavy", ("very heavy", "cold")),
        Example("b", instruction, "hot", ("very very heavy thing1", "hot", "very very cold")),
        Example("c", instruction, "very hot", ("very", "very hot")),
    ]
    return [*several, *questions[:5]]


@torch.no_grad()
def _plainly(model, tokenizer, example) -> dict[str, float]:
    """Sum of log p over all tokens of each candidate."""
    text = prompt(example, TEMPLATE) + ANSWER_PREFIX
    before = len(tokenizer(text)["input_ids"])
    scores = {}
    for candidate in example.candidates:
        ids = torch.tensor([tokenizer(text + candidate)["input_ids"]])  # (1, tokens)
        log_p = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits.log_softmax(-1)
        scores[candidate] = sum(log_p[0, i - 1, ids[0, i]].item() for i in range(before, ids.shape[1]))
    return scores


def test_scores_differ_between_candidates_as_read_plainly(base, mixed):
    for prediction, example in zip(likelihood(*base, mixed, TEMPLATE, 4), mixed, strict=True):
        expected = _plainly(*base, example)
        shift = prediction.log_likelihoods[example.candidates[0]] - expected[example.candidates[0]]
        assert prediction.log_likelihoods == pytest.approx({c: v + shift for c, v in expected.items()}, abs=1e-4)
        assert prediction.prediction == max(expected, key=expected.get)


def test_where_candidates_share_no_token_the_scores_are_whole_log_likelihoods(base, questions):
    (prediction,) = likelihood(*base, questions[:1], TEMPLATE, 1)
    assert prediction.log_likelihoods == pytest.approx(_plainly(*base, questions[0]), abs=1e-5)


@pytest.mark.parametrize("batch_size", [1, 3, 100])
def test_results_do_not_depend_on_the_batch_and_keep_the_order(base, mixed, questions, batch_size):
    examples = mixed + questions
    predictions = likelihood(*base, examples, TEMPLATE, batch_size)
    assert [(p.id, p.gold) for p in predictions] == [(e.id, e.answer) for e in examples]
    for one, other in zip(predictions, likelihood(*base, examples, TEMPLATE, 7), strict=True):
        assert one.prediction == other.prediction
        assert one.log_likelihoods == pytest.approx(other.log_likelihoods, abs=1e-5)


def test_the_same_call_gives_the_same_bits_and_leaves_the_mode(base, questions):
    model, tokenizer = base
    model.train()
    first = likelihood(model, tokenizer, questions, TEMPLATE, 8)
    assert model.training
    assert likelihood(model.eval(), tokenizer, questions, TEMPLATE, 8) == first


def test_the_likelier_answer_wins(tiny_base, questions):
    model, tokenizer = load_base(str(tiny_base))
    true, false = tokenizer.convert_tokens_to_ids(["true", "false"])
    head = model.get_output_embeddings().weight
    with torch.no_grad():
        boolq = likelihood(model, tokenizer, questions[:20], TEMPLATE, 8)
        head[[true, false]] = head[[false, true]]
        swapped = likelihood(model, tokenizer, questions[:20], TEMPLATE, 8)
    assert all(a.prediction != b.prediction for a, b in zip(boolq, swapped, strict=True))


def test_a_prompt_beyond_the_models_positions_loses_its_beginning(tiny_base, questions):
    model, tokenizer = load_base(str(tiny_base))
    whole = likelihood(model, tokenizer, questions, TEMPLATE, 8)
    model.config.max_position_embeddings = 16
    cut = likelihood(model, tokenizer, questions, TEMPLATE, 8)
    assert len(cut) == len(whole) and cut != whole


def test_overflow_is_an_error_and_not_an_answer(tiny_base, questions):
    model, tokenizer = load_base(str(tiny_base))
    with torch.no_grad():
        model.get_output_embeddings().weight.fill_(float("nan"))
    with pytest.raises(ValueError, match="boolq-test-.*log-likelihood of 'true' is nan.*lower the learning rate"):
        likelihood(model, tokenizer, questions[:2], TEMPLATE, 8)


# --- one forward a question ---


@torch.no_grad()
def _whole(model, tokenizer, example) -> dict[str, float]:
    """Log p of every token of each candidate, one sequence at a time: what `log_likelihoods` must be."""
    before = tokenizer(prompt(example, TEMPLATE) + ANSWER_PREFIX)["input_ids"]
    scores = {}
    for candidate in example.candidates:
        ids = tokenizer(prompt(example, TEMPLATE) + ANSWER_PREFIX + candidate)["input_ids"]
        assert ids[: len(before)] == before
        log_p = model(input_ids=torch.tensor([ids])).logits[0].double().log_softmax(-1)  # (tokens, vocabulary)
        scores[candidate] = sum(log_p[i - 1, ids[i]].item() for i in range(len(before), len(ids)))
    return scores


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("batch_size", [1, 2, 50])
def test_likelihoods_equal_a_slow_reference_at_every_batch_size(tiny_base, mixed, questions, attention, batch_size):
    model, tokenizer = load_base(str(tiny_base))
    model.set_attn_implementation(attention)
    examples = mixed + questions[:6]
    for p, example in zip(likelihood(model, tokenizer, examples, TEMPLATE, batch_size), examples, strict=True):
        expected = _whole(model, tokenizer, example)
        assert p.log_likelihoods == pytest.approx(expected, abs=1e-5)
        lengths = {c: len(c.split()) for c in example.candidates}  # the tiny tokenizer's tokens are words
        if max(lengths.values()) == 1:
            assert p.log_likelihoods_per_token is None and per_token([p]) == [p]
        else:
            each = {c: v / lengths[c] for c, v in expected.items()}
            assert p.log_likelihoods_per_token == pytest.approx(each, abs=1e-5)
            assert per_token([p])[0].prediction == max(each, key=each.get)


def test_a_question_goes_through_the_model_once(base, mixed, monkeypatch):
    model, tokenizer = base
    rows = []
    forward = model.forward
    monkeypatch.setattr(model, "forward", lambda **kw: rows.append(len(kw["input_ids"])) or forward(**kw))
    likelihood(model, tokenizer, mixed, TEMPLATE, 3)
    assert sum(rows) == len(mixed)


@pytest.mark.parametrize("batch_size", [1, 4, 50])
def test_what_all_prompts_begin_with_is_read_once(tiny_base, mixed, monkeypatch, batch_size):
    model, tokenizer = load_base(str(tiny_base))
    beginning = "the heavy thing1 met the thing2 and was cold " * 4
    examples = [replace(e, instruction=beginning + e.instruction) for e in mixed]
    lengths = []
    forward = model.forward
    monkeypatch.setattr(model, "forward", lambda **kw: lengths.append(kw["input_ids"].shape) or forward(**kw))
    predictions = likelihood(model, tokenizer, examples, TEMPLATE, batch_size)
    assert lengths[0][0] == 1 and lengths[0][1] >= 36 and sum(rows for rows, _ in lengths[1:]) == len(examples)
    monkeypatch.undo()
    for p, example in zip(predictions, examples, strict=True):
        assert p.log_likelihoods == pytest.approx(_whole(model, tokenizer, example), abs=1e-5)
    assert predictions == likelihood(model, tokenizer, examples, TEMPLATE, batch_size)


def test_the_padding_is_not_seen(tiny_base, mixed):
    model, tokenizer = load_base(str(tiny_base))
    before = [likelihood(model, tokenizer, mixed, TEMPLATE, 100)]
    with torch.no_grad():
        model.get_input_embeddings().weight[0] = 7.0  # token 0 pads; no question has it
    before.append(likelihood(model, tokenizer, mixed, TEMPLATE, 100))
    assert before[0] == before[1]


# --- generation ---


@pytest.fixture(scope="module")
def talker(tiny_base, tiny_data):
    """A tiny model that has learnt the answer's sentence, so that generations are parsed."""
    model, tokenizer = load_base(str(tiny_base))
    examples = load_examples(str(tiny_data), "boolq", "train")
    rows, _ = tokenized(tokenizer, examples, TEMPLATE, append_eos=True, cutoff_tokens=64)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for step in range(60):
        row = rows[step % len(rows)]
        ids, labels = (torch.tensor([row[name]]) for name in ("input_ids", "labels"))
        model(input_ids=ids, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model, tokenizer


@torch.no_grad()
def _beams(model, tokenizer, example) -> str:
    """One prompt without padding, through transformers' beam search."""
    ids = torch.tensor([tokenizer(prompt(example, TEMPLATE))["input_ids"]])  # (1, tokens)
    written = model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        num_beams=4,
        max_new_tokens=32,
        do_sample=False,
        use_cache=True,
        pad_token_id=tokenizer.pad_token_id,
    )
    return tokenizer.decode(written[0, ids.shape[1] :], skip_special_tokens=True).strip()


@pytest.mark.parametrize("batch_size", [1, 3, 20])
def test_generations_equal_one_prompt_at_a_time(talker, questions, batch_size):
    examples = [q for q in questions if q.id.startswith("boolq")][:9]
    predictions = generate(*talker, examples, TEMPLATE, batch_size)
    assert [(p.id, p.gold) for p in predictions] == [(e.id, e.answer) for e in examples]
    for p, example in zip(predictions, examples, strict=True):
        assert p.text == _beams(talker[0].eval(), talker[1], example)
        assert p.parsed and p.prediction in example.candidates and p.log_likelihoods == {}


def test_what_has_no_answer_word_is_unparsed_and_wrong(base, questions, monkeypatch):
    model, tokenizer = base
    silent = torch.full((3, 4), tokenizer.eos_token_id)
    monkeypatch.setattr(model, "generate", lambda input_ids, **kw: torch.cat([input_ids, silent], 1))
    predictions = generate(model, tokenizer, questions[:3], TEMPLATE, 3)
    assert all(not p.parsed and p.prediction == "" and p.text == "" for p in predictions)
    assert accuracy(predictions) == 0


def test_a_prompt_that_leaves_no_room_to_write_loses_its_beginning(tiny_base, questions):
    model, tokenizer = load_base(str(tiny_base))
    model.config.max_position_embeddings = 48
    assert len(generate(model, tokenizer, questions[:2], TEMPLATE, 2)) == 2


def test_generating_leaves_the_mode(talker, questions):
    model, tokenizer = talker
    model.train()
    generate(model, tokenizer, questions[:1], TEMPLATE, 1)
    assert model.training


# --- what is written ---


def test_rows_have_what_applies_and_nothing_else():
    scored = Prediction("boolq-test-0", "true", "true", {"true": -1.0, "false": -2.0})
    assert as_row(scored) == {
        "id": "boolq-test-0",
        "gold": "true",
        "prediction": "true",
        "log_likelihoods": {"true": -1.0, "false": -2.0},
        "parsed": True,
    }
    written = Prediction("piqa-test-0", "solution1", "", {}, parsed=False, text="I do not know")
    assert as_row(written)["text"] == "I do not know" and not as_row(written)["parsed"]
    assert accuracy_by_task([scored, written]) == {"boolq": 1.0, "piqa": 0.0}
