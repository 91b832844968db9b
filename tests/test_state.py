"""State dicts with models, optimizers and other objects in them: saved and loaded."""

import json
import pickle
import subprocess
import sys
from collections import Counter, UserDict
from pathlib import Path
from secrets import token_hex

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict

from cloudckpt.dcp import ObjectStoreReader, ObjectStoreWriter
from cloudckpt.dcp.state.stateful import Destination, to_save
from cloudckpt.errors import CheckpointError, LoadFailedError, MissingKeyError, SaveFailedError, UnstorableError
from states import TENSOR, Feed, Net, adamw, equal, load, metadata_at, save, train


@pytest.fixture
def url():
    return f"memory://{token_hex(6)}/run/step-1"


# The user's own containers.


def test_values_and_tensors_are_loaded_into_the_very_containers_and_tensors(url):
    save({"step": 3, "nested": {"w": TENSOR, "names": ["a"]}, "groups": [{"lr": 0.5}]}, url)
    w, nested, groups, group = torch.zeros(3), {}, [], {"lr": 0.0}
    nested.update({"w": w, "names": []})
    groups.append(group)
    load({"step": 0, "nested": nested, "groups": groups}, url)
    assert torch.equal(w, TENSOR)
    assert nested["w"] is w
    assert nested["names"] == ["a"]
    assert group == {"lr": 0.5}


def test_numbers_stay_numbers_in_the_users_own_dicts(url):
    saved = {"moments": {0: {"m": TENSOR, "step": 3}}, "counts": {1: 2}, "none": {}}
    save(saved, url)
    state = {"moments": {0: {"m": torch.zeros(3), "step": 0}}, "counts": {1: 0, 5: 6}, "none": {"a": 1}}
    state["none"].clear()
    load(state, url)
    assert equal(state, saved)


def test_what_dcp_alone_saved_is_loaded_too(url):
    dcp.save({"w": TENSOR, "moments": {0: TENSOR}, "none": {}}, storage_writer=ObjectStoreWriter(url))
    state = load({"w": torch.zeros(3), "moments": {0: torch.zeros(3)}, "none": {}}, url)
    assert equal(state, {"w": TENSOR, "moments": {0: TENSOR}, "none": {}})


def test_what_was_saved_here_dcp_alone_loads_too(url):
    model = Net()
    save({"model": model, "optim": adamw(model), "step": 3}, url)
    weights, moments = get_state_dict(fresh := Net(1), adamw(fresh))
    state = {"model": weights, "optim": moments, "step": 0}
    dcp.load(state, storage_reader=ObjectStoreReader(url))
    assert equal(dict(state["model"]), dict(model.state_dict()))
    assert state["optim"]["param_groups"][0]["betas"] == (0.9, 0.999)
    assert state["step"] == 3


# Models and optimizers.


def test_a_model_and_its_optimizer_resume_bit_for_bit(url):
    model = Net()
    optimizer = adamw(model)
    train(model, optimizer)
    save({"model": model, "optim": optimizer}, url)
    expected = train(model, optimizer)
    fresh = Net(1)
    other = adamw(fresh)
    load({"model": fresh, "optim": other}, url)
    assert train(fresh, other) == expected


def test_they_are_kept_under_torchs_own_names(url):
    model = Net()
    optimizer = adamw(model)
    train(model, optimizer)
    save({"model": model, "optim": optimizer}, url)
    keys = metadata_at(url).state_dict_metadata
    assert {"model.a.weight", "optim.state.a.weight.exp_avg", "optim.param_groups.0.lr"} <= set(keys)


def test_one_model_with_two_optimizers(url):
    model = Net()
    optimizers = [adamw(model.a), torch.optim.SGD(model.b.parameters(), lr=0.1, momentum=0.9)]
    train(model, *optimizers)
    save({"model": model, "optims": optimizers}, url)
    expected = train(model, *optimizers)
    fresh = Net(1)
    others = [adamw(fresh.a), torch.optim.SGD(fresh.b.parameters(), lr=0.1, momentum=0.9)]
    load({"model": fresh, "optims": others}, url)
    assert train(fresh, *others) == expected


def test_two_models_each_with_its_optimizer(url):
    models = {"one": Net(0), "two": Net(1)}
    optimizers = {name: adamw(model) for name, model in models.items()}
    for name, model in models.items():
        train(model, optimizers[name], steps=2 + len(name))
    save({"models": models, "optims": optimizers}, url)
    expected = {name: train(model, optimizers[name]) for name, model in models.items()}
    models = {"one": Net(2), "two": Net(3)}
    optimizers = {name: adamw(model) for name, model in models.items()}
    load({"models": models, "optims": optimizers}, url)
    assert {name: train(model, optimizers[name]) for name, model in models.items()} == expected


def test_an_optimizer_goes_with_the_smallest_model_that_has_its_parameters(url):
    model = Net()
    optimizer = adamw(model.a)
    train(model, optimizer)
    save({"all": model, "part": model.a, "optim": optimizer}, url)
    assert "optim.state.weight.exp_avg" in metadata_at(url).state_dict_metadata


def test_torchs_options_are_passed_on_to_what_takes_the_state(url):
    model = Net()
    optimizer = adamw(model)
    train(model, optimizer)
    save({"model": model, "optim": optimizer}, url)
    for options in (StateDictOptions(), StateDictOptions(strict=False)):
        destination = Destination({"model": model, "optim": optimizer}, metadata_at(url), options=options)
        del destination.state_dict["optim"]["state"]["a.weight"]
        dcp.load(destination.state_dict, storage_reader=ObjectStoreReader(url))
        if options.strict:
            with pytest.raises(LoadFailedError, match=r"'optim'.*Missing optimizer state"):
                destination.finish()
        else:
            destination.finish()


def test_models_take_their_state_before_others_and_those_in_their_order(url):
    class Noting(Feed):
        def load_state_dict(self, state):
            seen.append(state["name"])

    seen = []
    model = Net()
    model.register_load_state_dict_post_hook(lambda *_: seen.append("model"))
    state = {"a": Noting({"name": "a"}), "model": model, "b": Noting({"name": "b"})}
    save(state, url)
    load(state, url)
    assert seen == ["model", "a", "b"]


def test_a_model_alone(url):
    model = Net()
    save({"model": model}, url)
    fresh = Net(1)
    load({"model": fresh}, url)
    assert equal(dict(fresh.state_dict()), dict(model.state_dict()))


def test_an_optimizer_alone_is_restored_by_its_own_protocol(url):
    model = Net()
    optimizer = adamw(model)
    train(model, optimizer)
    save({"optim": optimizer}, url)
    fresh = Net()
    fresh.load_state_dict(model.state_dict())
    other = adamw(fresh)
    load({"optim": other}, url)
    assert train(fresh, other) == train(model, optimizer)


def test_an_optimizer_that_has_gradients_and_no_state_yet_is_given_its_own(url):
    model = Net()
    optimizer = adamw(model)
    train(model, optimizer)
    save({"model": model, "optim": optimizer}, url)
    expected = train(model, optimizer)
    fresh = Net(1)
    other = adamw(fresh)
    fresh(torch.ones(1, 4)).sum().backward()
    gradients = [parameter.grad for parameter in fresh.parameters()]
    load({"model": fresh, "optim": other}, url)
    assert all(parameter.grad is gradient for parameter, gradient in zip(fresh.parameters(), gradients, strict=True))
    other.zero_grad()
    assert train(fresh, other) == expected


def test_an_optimizer_without_state_needs_none(url):
    model = Net()
    save({"model": model, "optim": torch.optim.SGD(model.parameters(), lr=0.25)}, url)
    other = torch.optim.SGD((fresh := Net(1)).parameters(), lr=0.1)
    load({"model": fresh, "optim": other}, url)
    assert other.param_groups[0]["lr"] == 0.25


def test_torchs_options_are_passed_on(url):
    options = StateDictOptions(flatten_optimizer_state_dict=True)
    model = Net()
    optimizer = adamw(model)
    train(model, optimizer)
    save({"model": model, "optim": optimizer}, url, options=options)
    assert "optim.param_groups.a.weight.lr" in metadata_at(url).state_dict_metadata
    expected = train(model, optimizer)
    fresh = Net(1)
    other = adamw(fresh)
    load({"model": fresh, "optim": other}, url, options=options)
    assert train(fresh, other) == expected


def test_a_scheduler_with_milestones_comes_back_with_numbers(url):
    def scheduler(lr):
        optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=lr)
        return torch.optim.lr_scheduler.MultiStepLR(optimizer, milestones=[2, 4, 4], gamma=0.5)

    saved = scheduler(1.0)
    for _ in range(3):
        saved.optimizer.step()
        saved.step()
    save({"sched": saved}, url)
    fresh = scheduler(1.0)
    load({"sched": fresh}, url)
    assert fresh.state_dict() == saved.state_dict()
    assert isinstance(fresh.milestones, Counter)


def test_ranks_sharded_or_not_and_one_alone_give_the_same_names_and_resume_alike(tmp_path):
    script = Path(__file__).with_name("state_ranks.py")
    running = [
        subprocess.Popen(
            [sys.executable, "-W", "ignore", str(script), str(rank), str(tmp_path)], stdout=subprocess.PIPE, text=True
        )
        for rank in range(2)
    ]
    said = [process.communicate(timeout=200)[0] for process in running]
    assert [process.returncode for process in running] == [0, 0], said
    names = json.loads(said[0])
    url = f"file://{tmp_path}/plain"
    model = Net()
    optimizer = adamw(model)
    train(model, optimizer)
    save({"model": model, "optim": optimizer}, url)
    own = set(metadata_at(url).state_dict_metadata)
    assert set(names["fsdp2"]) == set(names["ddp"]) == own
    expected = train(model, optimizer)
    for way in ("fsdp2", "ddp"):
        fresh = Net(1)
        other = adamw(fresh)
        load({"model": fresh, "optim": other}, f"file://{tmp_path}/{way}")
        assert [float.fromhex(a) for a in train(fresh, other)] == pytest.approx([float.fromhex(a) for a in expected])


# Other objects.


def test_an_object_is_given_what_was_saved_whatever_a_fresh_one_has(url):
    save({"feed": Feed({"epoch": 2, "order": torch.tensor([3, 1, 2]), "seen": {"a": [1]}})}, url)
    for has in (torch.zeros(7), torch.zeros(7, dtype=torch.int64), torch.zeros(3), 5, None):
        fresh = Feed({"order": has, "other": 5})
        load({"feed": fresh}, url)
        assert equal(fresh.state, {"epoch": 2, "order": torch.tensor([3, 1, 2]), "seen": {"a": [1]}})


def test_objects_stand_anywhere_in_dicts_and_lists(url):
    save({"run": {"feeds": [Feed({"n": 1}), Feed({"n": 2})], 7: Feed({"n": 3})}, "step": 1}, url)
    feeds = [Feed(), Feed(), Feed()]
    state = {"run": {"feeds": feeds[:2], 7: feeds[2]}, "step": 0}
    load(state, url)
    assert [feed.state for feed in feeds] == [{"n": 1}, {"n": 2}, {"n": 3}]
    assert state == {"run": {"feeds": feeds[:2], 7: feeds[2]}, "step": 1}


def test_an_object_that_had_nothing_to_say_is_told_so(url):
    save({"feed": Feed({}), "step": 1}, url)
    fresh = Feed({"n": 5})
    load({"feed": fresh, "step": 0}, url)
    assert fresh.state == {}


def test_an_object_that_the_checkpoint_lacks_is_named(url):
    save({"step": 1}, url)
    with pytest.raises(MissingKeyError, match=r"nothing of 'data\.feed' \(Feed\)"):
        load({"step": 0, "data": {"feed": Feed({"n": 1})}}, url)


class Broken(Feed):
    def __init__(self, at, error=None):
        super().__init__({"n": 1})
        self.at, self.error = at, error or ValueError("no")

    def state_dict(self):
        if self.at == "state_dict":
            raise self.error
        return [1] if self.at == "type" else self.state

    def load_state_dict(self, state):
        if self.at == "load_state_dict":
            raise self.error


def test_an_object_that_fails_is_named(url):
    with pytest.raises(SaveFailedError, match=r"'a\.feed' \(Broken\) gave no state dict: ValueError: no"):
        to_save({"a": {"feed": Broken("state_dict")}})
    with pytest.raises(UnstorableError, match=r"'feed' \(Broken\): its state_dict\(\) is a list"):
        to_save({"feed": Broken("type")})
    save({"feed": Broken("")}, url)
    with pytest.raises(LoadFailedError, match=r"'feed' \(Broken\) did not take its state: ValueError: no"):
        load({"feed": Broken("load_state_dict")}, url)
    with pytest.raises(LoadFailedError, match=r"'feed' \(Broken\) cannot be loaded into: ValueError: no"):
        load({"feed": Broken("state_dict")}, url)


def test_an_error_of_ours_keeps_its_class_and_its_notes():
    error = CheckpointError("deep")
    error.add_note("a note")
    with pytest.raises(CheckpointError, match=r"'feed' \(Broken\): deep") as e:
        to_save({"feed": Broken("state_dict", error)})
    assert pickle.loads(pickle.dumps(e.value)).__notes__ == ["a note"]


def test_a_class_is_no_object_and_a_mapping_may_be_one(url):
    class Remembering(UserDict):
        def state_dict(self):
            return {"held": dict(self)}

        def load_state_dict(self, state):
            self.update(state["held"])

    save({"m": Remembering(a=1)}, url)
    state = load({"m": Remembering()}, url)
    assert state["m"] == {"a": 1}
    assert type(state["m"]) is Remembering
    assert to_save({"kind": Feed}) == {"kind": Feed}
