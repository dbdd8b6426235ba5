"""Truncating a trained update: all of it is the trained model, nothing of it is the base."""

import pytest
import torch
from transformers.pytorch_utils import Conv1D

from dora_lab.adapters import adapted_modules
from dora_lab.checkpoint import load_adapter
from dora_lab.models import load_model
from dora_lab.probes import target_linears
from dora_lab.records import run_folder
from dora_lab.training import finetune
from dora_lab.truncation import decompose, kept_ranks, run_update, threshold_of, truncated


def diagonal(*values: float) -> torch.Tensor:
    return torch.diag(torch.tensor(values))


def test_one_threshold_ranks_the_values_of_all_modules_together():
    zero = torch.zeros(3, 3)
    update = decompose({"a": zero, "b": zero}, {"a": diagonal(5, 3, 1), "b": diagonal(4, 0.5, 0.1)})
    kept = [kept_ranks(update, threshold_of(update, total)) for total in (0, 1, 2, 3, 4, 100)]
    assert [tuple(one.values()) for one in kept] == [(0, 0), (1, 0), (1, 1), (2, 1), (3, 1), (3, 3)]
    with pytest.raises(ValueError, match=r"\['b'\] differ"):
        decompose({"a": zero}, {"a": zero, "b": zero})


@pytest.mark.parametrize("method", ["lora", "dora", "dora-magnitude", "full"])
def test_the_whole_update_is_the_trained_model_and_no_update_the_base(tiny_spec, tmp_path, method):
    spec = tiny_spec("boolq", method, dropout=0.0, geometry=False)
    finetune(spec, tmp_path, progress=False)
    update, base = run_update(spec, tmp_path), load_model(spec.base_model)
    trained, folder = load_model(spec.base_model), run_folder(tmp_path, spec)
    if method == "full":
        own = load_model(str(folder / "model"))
        for name, linear in target_linears(trained, spec.target_modules).items():  # these weights alone
            linear.weight.data = own.get_submodule(name).weight.data
    else:
        load_adapter(trained, folder / "adapter")
    tokens, before = torch.arange(3, 15)[None], {name: p.clone() for name, p in base.named_parameters()}
    with torch.no_grad():
        untouched, wanted = base(tokens).logits, trained(tokens).logits
        with truncated(base, update, 0.0, spec.target_modules):
            torch.testing.assert_close(base(tokens).logits, wanted, rtol=1e-4, atol=1e-4)
        with truncated(base, update, threshold_of(update, 0), spec.target_modules):
            assert torch.equal(base(tokens).logits, untouched)
    assert not torch.allclose(untouched, wanted, atol=1e-3)
    assert all(torch.equal(p, before[name]) for name, p in base.named_parameters())


def test_the_update_of_lora_has_its_rank_and_that_of_dora_has_not(tiny_spec, tmp_path):
    ranks = {}
    for method in ("lora", "dora"):
        spec = tiny_spec("boolq", method, geometry=False)
        finetune(spec, tmp_path, progress=False)
        ranks[method] = kept_ranks(run_update(spec, tmp_path), 1e-6)
    assert set(ranks["lora"].values()) == {2}
    assert all(rank > 2 for rank in ranks["dora"].values())


def test_a_frozen_target_has_no_update(tiny_spec, tmp_path):
    spec = tiny_spec("boolq", "dora", method_pattern={"layers.0.self_attn.q_proj": "frozen"}, geometry=False)
    finetune(spec, tmp_path, progress=False)
    ranks = kept_ranks(run_update(spec, tmp_path), 1e-6)
    assert [name for name, rank in ranks.items() if rank == 0] == ["model.layers.0.self_attn.q_proj"]


def test_an_update_is_added_the_right_way_round_and_to_no_layer_that_shares_the_weight():
    model = torch.nn.ModuleDict({"embed": torch.nn.Embedding(6, 6), "proj": Conv1D(6, 6)})
    model["embed"].weight = model["proj"].weight
    before, update = model["proj"].weight.detach().clone(), torch.randn(6, 6)  # (in, out), (out, in)
    with truncated(model, decompose({"proj": torch.zeros(6, 6)}, {"proj": update}), 0.0, ["proj"]):
        torch.testing.assert_close(model["proj"].weight, before + update.T)
        assert torch.equal(model["embed"].weight, before)
    assert model["embed"].weight is model["proj"].weight and torch.equal(model["proj"].weight, before)
    model["proj"].weight = torch.nn.Parameter(before.to(torch.int8), requires_grad=False)
    with (
        pytest.raises(ValueError, match="proj is quantised: load the base in 16 or 32 bits"),
        truncated(model, {}, 0.0, ["proj"]),
    ):
        pass


def test_a_recorded_run_without_its_adapter_says_what_to_do(tiny_spec, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"adapter does not exist: delete .* and run again"):
        run_update(tiny_spec(), tmp_path)


def test_a_rank_pattern_is_trained_saved_and_read_back(tiny_spec, tmp_path):
    pattern = {"layers.0.self_attn.q_proj": 5, "up_proj": 1}
    spec = tiny_spec("boolq", "dora", rank_pattern=pattern, alpha_pattern={"up_proj": 3.0}, geometry=False)
    record = finetune(spec, tmp_path, progress=False)
    model = load_adapter(load_model(spec.base_model), run_folder(tmp_path, spec) / "adapter")
    ranks = {name: module.lora_A.shape[0] for name, module in adapted_modules(model).items()}
    assert [rank for name, rank in ranks.items() if "up_proj" in name] == [1, 1]
    assert [rank for name, rank in ranks.items() if "q_proj" in name] == [5, 2]
    assert record.result.trainable_parameters == sum(
        parameter.numel()
        for module in adapted_modules(model).values()
        for parameter in (module.lora_A, module.lora_B, module.magnitude)
    )
    assert model.adapter_config.rank_pattern == pattern and model.adapter_config.alpha_pattern == {"up_proj": 3.0}
