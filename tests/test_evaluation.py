"""Likelihood scoring equals the plain reading of it: one sequence at a time, all logits, no tricks."""

import pytest
import torch

from dora_lab.data import load_examples
from dora_lab.evaluation import likelihood
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
