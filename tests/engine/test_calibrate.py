"""A calibration describes the executor that it timed. It is kept per machine and model; a broken file is ignored."""

from dataclasses import replace

import pytest

from stallfree.core.plan import Capacity, Plan, StepResult
from stallfree.engine.calibrate import VERSION, calibrate, remember, remembered
from stallfree.executors.simulated import Linear

COST = Linear(iteration_s=0.01, token_s=0.0004, context_s=0.0)
CAPACITY = Capacity(block_size=32, num_blocks=400, max_model_len=4096)
KEY = {"cpu": "one", "model": "that"}


class Instant:
    """An executor that reports the times of `COST` and takes none itself."""

    def __init__(self, blocks: int = 400) -> None:
        self.capacity = Capacity(block_size=32, num_blocks=blocks, max_model_len=4096)
        self.plans: list[Plan] = []

    def submit(self, plan: Plan) -> None:
        self.plans.append(plan)

    def collect(self) -> StepResult:
        plan = self.plans[-1]
        return StepResult(plan.step, {w.id: (0,) for w in plan.work if w.samples}, COST.seconds(plan.shape))

    def close(self) -> None:
        pass


def test_the_model_describes_the_executor():
    model, errors = calibrate(Instant())
    assert COST.seconds([(700, 1)] * 6 + [(100, 90)]) == pytest.approx(model.seconds([(700, 1)] * 6 + [(100, 90)]), rel=0.01)
    assert errors.largest < 0.01


@pytest.mark.parametrize("blocks", [1, 20, 400])
def test_no_block_is_named_that_the_executor_does_not_have(blocks):
    executor = Instant(blocks)
    calibrate(executor)
    assert executor.plans
    assert all(0 <= block < blocks for plan in executor.plans for work in plan.work for block in work.blocks)


def test_progress_ends_at_the_end():
    progress = []
    calibrate(Instant(), lambda done, of: progress.append((done, of)))
    assert progress[-1][0] == progress[-1][1]
    assert progress == sorted(progress)


def test_a_calibration_is_remembered_for_its_key_alone(tmp_path):
    model, errors = calibrate(Instant())
    remember(model, errors, KEY, tmp_path / "new", CAPACITY)
    assert model.prices == remembered(KEY, tmp_path / "new").prices
    assert None is remembered({**KEY, "cpu": "another"}, tmp_path / "new")


@pytest.mark.parametrize(
    "content", ["", "{", "[]", f'{{"version": {VERSION}}}', f'{{"version": {VERSION}, "model": {{"prices": [1]}}}}']
)
def test_a_broken_calibration_is_named_and_passed_over(tmp_path, caplog, content):
    file = remember(*calibrate(Instant()), KEY, tmp_path, CAPACITY)
    file.write_text(content)
    assert None is remembered(KEY, tmp_path)
    assert str(file) in caplog.text
    assert "calibrating again replaces it" in caplog.text


def test_a_calibration_of_another_version_is_passed_over(tmp_path):
    file = remember(*calibrate(Instant()), KEY, tmp_path, CAPACITY)
    file.write_text(file.read_text().replace(f'"version": {VERSION}', '"version": 0'))
    assert None is remembered(KEY, tmp_path)


def test_a_place_that_cannot_be_written_costs_a_line_in_the_log(tmp_path, caplog):
    (tmp_path / "file").touch()
    remember(*calibrate(Instant()), KEY, tmp_path / "file", CAPACITY)
    assert "cannot be kept" in caplog.text


class TwoWays(Instant):
    """Takes up to `quick` tokens in less time another way, and more in more."""

    most_few = 8

    def __init__(self, quick: int) -> None:
        super().__init__()
        self.quick, self.few, self.settled = quick, 8, False

    def settle(self) -> None:
        self.settled = True

    def submit(self, plan: Plan) -> None:
        assert self.settled
        super().submit(plan)

    def collect(self) -> StepResult:
        result, tokens = super().collect(), sum(w.count for w in self.plans[-1].work)
        factor = 1 if tokens > self.few else 0.4 if tokens <= self.quick else 1.5
        return replace(result, seconds=factor * result.seconds)


@pytest.mark.parametrize(("quick", "few"), [(0, 0), (1, 1), (2, 2), (3, 2), (4, 4), (7, 4), (9, 8)])
def test_few_tokens_go_the_way_that_is_quicker_for_them(quick, few):
    executor = TwoWays(quick)
    model, _ = calibrate(executor)
    assert (executor.few, model.few) == (few, few)
