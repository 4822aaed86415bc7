"""A user's mistake that is found in another process arrives as its one line."""

import os
import sys

import pytest

from ray_jobs.runtime import guard_local_ray, user_message
from recgpt.errors import UserError

MESSAGE = "log.csv: no column 'user'; name it with --user-column"


def fail(*_arguments):
    raise UserError(MESSAGE)


class FailsAtOnce:
    def __init__(self):
        fail()

    def call(self):
        return None


class FailsWhenCalled:
    def __call__(self, batch):
        fail()

    def call(self):
        fail()


def in_a_task():
    import ray

    ray.get(ray.remote(fail).remote())


def in_a_nested_task():
    import ray

    ray.get(ray.remote(in_a_task).remote())


def in_an_actor():
    import ray

    ray.get(ray.remote(FailsWhenCalled).remote().call.remote())


def in_the_making_of_an_actor():
    import ray

    ray.get(ray.remote(FailsAtOnce).remote().call.remote())


def in_a_data_task():
    import ray

    ray.data.range(4).map_batches(fail).materialize()


def in_a_data_actor():
    import ray

    ray.data.range(4).map_batches(FailsWhenCalled, compute=ray.data.ActorPoolStrategy(size=1)).materialize()


@pytest.mark.ray
@pytest.mark.usefixtures("local_ray")
@pytest.mark.parametrize(
    "place",
    [
        in_a_task,
        in_a_nested_task,
        in_an_actor,
        in_the_making_of_an_actor,
        in_a_data_task,
        in_a_data_actor,
    ],
)
def test_the_message_survives_the_way_from_another_process(place):
    with pytest.raises(Exception) as caught:  # noqa: PT011
        place()
    assert user_message(caught.value) == MESSAGE


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.usefixtures("local_ray")
def test_the_message_survives_the_way_from_a_training_worker(tmp_path):
    from ray.train import RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer

    trainer = TorchTrainer(
        fail,
        train_loop_config={},
        scaling_config=ScalingConfig(num_workers=1, use_gpu=False),
        run_config=RunConfig(name="run", storage_path=str(tmp_path)),
    )
    with pytest.raises(Exception) as caught:  # noqa: PT011
        trainer.fit()
    assert user_message(caught.value) == MESSAGE


def test_a_user_error_behind_another_error_is_found():
    with pytest.raises(RuntimeError) as caught:  # noqa: PT012
        try:
            fail()
        except UserError as error:
            raise RuntimeError("the job failed") from error
    assert user_message(caught.value) == MESSAGE


def test_another_error_has_no_message_for_the_user():
    assert user_message(ValueError("recgpt is fine")) is None


@pytest.fixture
def environment(monkeypatch):
    """An empty environment of a process that has not imported Ray yet."""
    variables = {}
    monkeypatch.setattr(os, "environ", variables)
    monkeypatch.delitem(sys.modules, "ray", raising=False)
    return variables


def test_a_local_ray_gets_a_token_of_its_own(environment):
    guard_local_ray()
    assert environment["RAY_AUTH_MODE"] == "token"
    assert len(environment["RAY_AUTH_TOKEN"]) == 64


@pytest.mark.parametrize(("name", "value"), [("RAY_ADDRESS", "10.0.0.1:6379"), ("RAY_AUTH_MODE", "disabled")])
def test_what_the_environment_says_about_ray_is_kept(environment, name, value):
    environment[name] = value
    guard_local_ray()
    assert {key: environment[key] for key in environment if key.startswith("RAY_")} == {name: value}
