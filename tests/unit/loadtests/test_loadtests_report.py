"""Due times and the report's arithmetic."""

import json

import pytest

from loadtests.arrivals import Arrivals
from loadtests.report import Report, Sample, percentile, sample, table
from loadtests.sse import Stream


def make_sample(**changes: object) -> Sample:
    fields = {
        "started": 0.0,
        "ended": 1.0,
        "late_s": 0.0,
        "tokens": 5,
        "first_token_s": 0.2,
        "inter_token_s": 0.2,
        "gaps_s": (0.1, 0.3),
    }
    return Sample(**(fields | changes))  # type: ignore[arg-type]


def make_report(*samples: Sample) -> Report:
    report = Report(target_first_token_s=0.5, target_inter_token_s=0.25)
    for one in samples:
        report.add(one)
    return report


def test_even_arrivals_do_not_drift() -> None:
    arrivals = Arrivals(rate=10, start=100.0)
    due = [arrivals.take() for _ in range(10_001)]
    assert due[0] == 100.0
    assert due[10_000] == 1100.0


def test_poisson_arrivals_have_the_same_mean_and_repeat_with_their_seed() -> None:
    def make() -> list[float]:
        arrivals = Arrivals(rate=10, start=0.0, poisson=True, seed=7)
        return [arrivals.take() for _ in range(10_001)]

    due = make()
    assert due == make()
    assert due[10_000] == pytest.approx(1000, rel=0.05)
    assert due == sorted(due)


def test_a_rate_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="above 0"):
        Arrivals(rate=0, start=0.0)


@pytest.mark.parametrize(("percent", "expected"), [(50, 2.0), (75, 3.0), (76, 4.0), (99, 4.0), (100, 4.0), (1, 1.0)])
def test_percentiles_are_values_that_were_measured(percent: float, expected: float) -> None:
    assert percentile([4.0, 1.0, 3.0, 2.0], percent) == expected


def test_no_values_have_no_percentile() -> None:
    assert percentile([], 50) is None


def test_a_sample_counts_lateness_from_the_due_time_and_the_rest_from_the_start() -> None:
    stream = Stream(arrivals=[11.0, 12.0, 13.0], finished=13.0, ended=14.0, tokens=3)
    assert sample(stream, due=9.5, start=10.0, zero=8.0) == Sample(
        started=2.0,
        ended=6.0,
        late_s=0.5,
        tokens=3,
        first_token_s=1.0,
        inter_token_s=1.0,
        gaps_s=(1.0, 1.0),
    )


def test_the_summary_leaves_out_the_times_of_failed_streams() -> None:
    report = make_report(make_sample(), make_sample(ended=2.0, failure="no [DONE]", first_token_s=99.0))
    summary = report.summary()
    assert (summary["requests"], summary["failures"], summary["tokens"]) == (2, 1, 5)
    assert summary["failures_by_reason"] == {"no [DONE]": 1}
    assert summary["ms"]["TTFT"] == {"n": 1, "p50": 200.0, "p90": 200.0, "p99": 200.0, "max": 200.0}
    assert summary["ms"]["ICL"]["max"] == 300.0


def test_a_late_start_counts_against_the_server_in_goodput() -> None:
    report = make_report(
        make_sample(),
        make_sample(late_s=0.4),  # first token 600 ms after it was due
        make_sample(inter_token_s=0.3),
        make_sample(inter_token_s=None),
    )
    summary = report.summary()
    assert summary["goodput_share"] == 0.5
    assert summary["goodput_per_s"] == 2.0
    assert summary["ms"]["TTFT"]["max"] == 200.0
    assert summary["ms"]["TTFT+late"]["max"] == 600.0


def test_samples_of_workers_add_up_at_the_master() -> None:
    worker, master = make_report(make_sample()), make_report(make_sample())
    master.extend(json.loads(json.dumps(worker.drain())))
    assert worker.summary()["requests"] == 0
    assert master.summary() == make_report(make_sample(), make_sample()).summary()


def test_an_empty_report_is_still_a_report() -> None:
    summary = make_report().summary()
    assert summary["requests"] == 0
    assert "0 requests" in table(summary)
