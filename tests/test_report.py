"""The report: its figures are the bill's, its page loads nothing and shows hostile text as text."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime
from fractions import Fraction
from html.parser import HTMLParser
from pathlib import Path

import browser
import numpy as np
import pytest
from filled_jobs import SECOND, Filled
from hypothesis import given
from hypothesis import strategies as st

from batchinfer import cli
from batchinfer.connectors.storage import open_store
from batchinfer.jobs.cost import settle
from batchinfer.jobs.folder import JobFolder, ShardName
from batchinfer.jobs.history import Moment
from batchinfer.jobs.lengths import Range, exactly
from batchinfer.jobs.prediction import Prediction
from batchinfer.jobs.records import Bill, Failure, PartFooter, WorkerRecord
from batchinfer.jobs.report import SHARDS_SHOWN, WORKERS_SHOWN, read_report, render_report
from batchinfer.jobs.report_bill import break_down, purposes
from batchinfer.jobs.report_charts import axis
from batchinfer.jobs.report_failures import EXAMPLES, OBJECTS
from batchinfer.jobs.report_lengths import PARTS, histogram
from batchinfer.jobs.report_spec import shareable_spec
from batchinfer.jobs.report_throughput import throughput
from batchinfer.jobs.rounds import FailedRow, cut_round
from batchinfer.jobs.throughput import Rates
from batchinfer.jobs.types import JobError

HOSTILE = (
    "</pre></style><script>alert(1)</script><img src=http://evil.example/x onerror=alert(1)>{{ 7777*7777 }}"
)
VOID = {"meta", "link", "br", "img", "input", "hr", "base"}


def page_of(job: Filled) -> str:
    return render_report(read_report(job.folder))


@pytest.fixture
def uri(tmp_path: Path) -> str:
    return f"memory://reports{tmp_path.as_posix()}"


@pytest.fixture
def done(uri: str) -> Filled:
    """A job that is done, with failures, a worker that was lost, and waste."""
    job = Filled(uri)
    spent = sum(
        job.commit(index, failed={index * 10 + 3: ("too_long", "the prompt is too long")})
        for index in range(4)
    )
    history = (Moment(5 * SECOND, 10, 100, 20, 50), Moment(9 * SECOND, 36, 800, 100, 130))
    bill = Bill(startup=SECOND, rows=spent, idle=3 * SECOND, storage=7, waste=11)
    job.beat(
        "a", state="left", exit_code=0, rows_done=36, completion_tokens=130, bill=bill, history=history
    )
    job.beat(
        "b",
        bill=Bill(startup=2 * SECOND, rows=5 * SECOND),
        rows_done=2,
        completion_tokens=8,
        host="elsewhere",
    )
    # The heartbeat of another host's worker is old when the report's time is late.
    return job


class Elements(HTMLParser):
    """Every element and text of a page; fails where tags are not balanced."""

    def __init__(self, page: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []
        self.ids: list[str] = []
        self.feed(page)
        self.close()
        assert self.open == [], f"never closed: {self.open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))
        self.ids += [value for name, value in attrs if name == "id" and value is not None]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag, f"</{tag}> closes something else"

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def check_page(page: str) -> str:
    """The page is well-formed, has no script and names nothing that a browser would load; its text."""
    elements = Elements(page)
    assert len(set(elements.ids)) == len(elements.ids)
    for tag, attributes in elements.found:
        assert tag not in {"script", "link", "img", "iframe", "object", "embed", "base", "image", "use"}
        for name, value in attributes.items():
            assert not name.startswith("on")
            assert name not in {"src", "href", "srcset", "action", "data", "poster", "xlink:href"}, value
            if name == "aria-labelledby":
                assert value in elements.ids
    style = page[page.index("<style>") : page.index("</style>")]
    assert "url(" not in style and "@import" not in style
    assert "default-src 'none'" in page
    return " ".join(" ".join(elements.text).split())


def test_a_finished_job(done: Filled) -> None:
    report = read_report(done.folder)
    text = check_page(render_report(report))
    for words in (
        "docs",
        "36",
        "of 40, 4 of 4 shards done",
        "Prefill",
        "Waste",
        "too_long",
        "Row 3",
        "input of",
    ):
        assert words in text
    assert report.status.state == "done"
    assert "Not committed yet" not in text


def test_the_bill_on_the_page_is_the_bill(done: Filled) -> None:
    report = read_report(done.folder)
    page = render_report(report)
    bill = report.settlement.bill
    *parts, whole = [int(number) for number in re.findall(r'data-nanoseconds="(\d+)"', page)]
    assert sum(parts) == whole == bill.total
    by_key = {bucket.key: bucket.nanoseconds for bucket in report.breakdown.buckets}
    assert by_key == {
        "prefill": report.settlement.prefill_ns,
        "decode": report.settlement.decode_ns,
        "startup": bill.startup,
        "idle": bill.idle,
        "storage": bill.storage,
        "waste": bill.waste,
    }
    assert float(report.breakdown.usd or 0) == pytest.approx(report.settlement.usd)
    amounts = [Fraction(line.cost.strip("$")) for line in report.workers]
    assert sum(amounts) == Fraction(report.breakdown.shown_usd.strip("$"))


def test_a_worker_lost_without_a_word_is_named_beside_the_bill(done: Filled) -> None:
    late = datetime.now(UTC).timestamp() + 3600
    report = read_report(done.folder, now=lambda: late)
    assert report.breakdown.unseen == 1
    text = check_page(render_report(report))
    assert "Unrecorded, beyond this bill: 1 worker was lost" in text
    assert "lost without a last word" in text


def test_a_job_without_any_worker(uri: str) -> None:
    text = check_page(page_of(Filled(uri)))
    for words in ("no worker has started", "No worker has reported yet", "No shard is committed yet"):
        assert words in text


def test_a_job_at_work_tells_open_rows_from_waste(uri: str) -> None:
    job = Filled(uri)
    charged = job.commit(0)
    job.beat(rows_done=12, bill=Bill(startup=SECOND, rows=charged + 9 * SECOND, waste=2 * SECOND))
    report = read_report(job.folder)
    found = {bucket.key: bucket.nanoseconds for bucket in report.breakdown.buckets}
    assert (found["open"], found["waste"]) == (9 * SECOND, 2 * SECOND)
    assert sum(found.values()) == report.settlement.bill.total
    text = check_page(render_report(report))
    assert "Not committed yet" in text and "still at work" in text and "of 40, 1 of 4 shards done" in text


def test_samples_and_a_job_without_a_price(uri: str) -> None:
    job = Filled(uri, price=None, sampling={"n": 3})
    charged = job.commit(0)
    job.beat(bill=Bill(startup=SECOND, rows=charged), usd_per_hour=None)
    report = read_report(job.folder)
    assert report.lengths.rows == 10
    assert report.lengths.completions is not None and report.lengths.completions.count == 30
    text = check_page(render_report(report))
    assert "no price was given" in text and "Where the time went" in text and "$" not in text


def test_what_was_predicted_stands_beside_what_came(done: Filled) -> None:
    assert "Predicted" not in check_page(page_of(done))
    prediction = Prediction(
        rows=40,
        pilot_rows=4,
        seed=0,
        prompt_tokens=exactly(1000.0),
        cached_tokens=0,
        completion_tokens=Range(111.0, 122.0, 133.0),
        worker_seconds=Range(100.0, 150.0, 240.0),
        seconds=Range(50.0, 75.0, 120.0),
        usd=Range(0.1, 0.15, 0.24),
        usd_per_hour=3.6,
        workers=2,
        backend="local",
        finished={},
        rejections={},
        first_rejection="",
        machine="here",
        engines=1,
        pilot_seconds=1.0,
        rates=Rates(startup=1.0, prefill=0.1, decode=((1, 0.1),), attention=0.0, max_rows=0, capacity=0),
    )
    done.folder.write_prediction(prediction.to_bytes())
    report = read_report(done.folder)
    text = check_page(render_report(report))
    actual = f"{report.settlement.completion_tokens:,}"
    assert f"Tokens out 122 111 to 133 {actual}" in text
    assert "Price $0.15 $0.1 to $0.24" in text


def test_hostile_text_is_text(uri: str) -> None:
    job = Filled(uri, name=HOSTILE, prompt="{{ text }} </pre><script>x</script>")
    job.commit(0, failed={1: (HOSTILE, HOSTILE), 2: ("bad_line", "\x00\ud7ff‮" + HOSTILE)})
    job.beat("a", host=HOSTILE, state="failed", exit_code=78, message=HOSTILE)
    text = check_page(page_of(job))
    assert text.count("<script>alert(1)</script>") >= 5
    assert "{{ 7777*7777 }}" in text and "60481729" not in text


def test_a_long_input_is_cut(uri: str) -> None:
    job = Filled(uri)
    job.commit(0, failed={1: ("bad_line", "y" * 100_000)})
    assert len(page_of(job)) < 100_000


def test_rows_that_a_round_has_tried_again_are_no_examples(uri: str) -> None:
    job = Filled(uri)
    job.beat()
    for index in range(4):
        job.commit(index, failed={index * 10: ("engine_crash", f"first {index}")})
    part = ShardName(0, 0, 4).part
    rows = [
        FailedRow(0, part, 1, "engine_crash"),
        FailedRow(10, ShardName(0, 1, 4).part, 1, "engine_crash"),
    ]
    assert job.folder.create_round(1, cut_round(rows, 1, "nonce"))
    job.commit(0, failed={0: ("engine_crash", "again")}, of=ShardName(1, 0, 2))
    report = read_report(job.folder)
    [kind] = report.failures
    assert kind.count == 4
    # Row 0 as its round failed it; row 10, whose shard of the round is open, as it failed at first.
    assert {(example.row_index, example.message) for example in kind.examples} <= {
        (0, "again"),
        (10, "first 1"),
        (20, "first 2"),
        (30, "first 3"),
    }
    assert (kind.examples[0].row_index, kind.examples[0].message) == (0, "again")


def test_a_job_of_many_shards_is_read_in_part_and_shown_in_part(
    uri: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = Filled(uri, shards=300, rows=2)
    for index in range(300):
        job.commit(index, failed={2 * index: (f"code {index % 100:02d}", "why")})
    for worker in range(WORKERS_SHOWN + 5):
        job.beat(f"worker {worker:03d}", bill=Bill(startup=SECOND + worker))
    read: Counter[str] = Counter()
    keep = job.folder.read_failures

    def counted(shard: ShardName, nonce: str) -> list[Failure]:
        read["failures"] += 1
        return keep(shard, nonce)

    monkeypatch.setattr(job.folder, "read_failures", counted)
    report = read_report(job.folder)
    assert read["failures"] <= OBJECTS
    assert (report.lengths.parts, report.lengths.parts_read) == (300, PARTS)
    assert len(report.shards) == SHARDS_SHOWN and len(report.shard_spans) <= 96
    assert sum(line.nanoseconds for line in report.workers) == report.settlement.bill.total
    assert len(report.workers) == WORKERS_SHOWN + 1
    assert all(len(kind.examples) <= EXAMPLES for kind in report.failures)
    text = check_page(render_report(report))
    assert "in 64 of the 300 committed shards" in text and "20 of 300 shards" in text and "5 others" in text


def test_a_spec_is_shown_without_secrets() -> None:
    spec = {
        "name": None,
        "model": {"source": "https://user:pass@host/m?sig=abc"},
        "prompt": "token=keep {{ api_key }}",
        "sampling": {"max_tokens": 5, "stop": ["Key: x"]},
        "workers": {
            "options": {
                "env": {"HF_TOKEN": "hf_abc"},
                "setup": ["export HF_TOKEN=hf_abc PATH=/bin"],
                "secrets": ["s"],
            }
        },
        "storage": {"s3://b/": {"secret_key": "abc", "region": "eu"}},
    }
    shown = shareable_spec(spec)
    for secret in ("hf_abc", "pass@", "sig=abc", "user:", ": abc"):
        assert secret not in shown
    for kept in ("max_tokens: 5", "region: eu", "HF_TOKEN", "PATH=/bin", "token=keep {{ api_key }}", "- s"):
        assert kept in shown
    assert "name" not in shown


prices = st.sampled_from([0.0, 0.2, 2.5, 1 / 3, 31.7])
times = st.integers(0, 10**13)


@given(
    st.lists(st.tuples(prices, times, times, times, times, times), min_size=1, max_size=5),
    st.booleans(),
    st.integers(0, 10),
)
def test_the_purposes_are_the_bill_in_any_case(
    workers: list[tuple[float, int, int, int, int, int]], complete: bool, tenths: int
) -> None:
    records = [
        WorkerRecord(
            worker=str(number),
            state="left",
            beat=1,
            usd_per_hour=price,
            bill=Bill(startup=startup, rows=rows, idle=idle, storage=storage, waste=waste),
            started="",
        )
        for number, (price, startup, rows, idle, storage, waste) in enumerate(workers)
    ]
    charged = {record.worker: record.bill.rows * tenths // 10 for record in records}
    total = sum(charged.values())
    cost = sum(charged[record.worker] * (record.usd_per_hour or 0) / 3.6e12 for record in records)
    footer = PartFooter(
        nonce="",
        worker="",
        rows=1,
        nanoseconds=charged,
        prefill_ns=total // 3,
        decode_ns=total - total // 3,
        prefill_usd=cost / 3,
        decode_usd=cost - cost / 3,
    )
    settlement = settle(records, [footer])
    found = break_down(settlement, records, complete, 0)
    assert sum(bucket.nanoseconds for bucket in found.buckets) == settlement.bill.total == found.nanoseconds
    assert min(bucket.nanoseconds for bucket in found.buckets) >= 0
    shown = [Fraction(bucket.shown_usd.replace(",", "").strip("$")) for bucket in found.buckets]
    assert sum(shown) == Fraction(found.shown_usd.replace(",", "").strip("$"))
    assert sum((bucket.usd or Fraction(0)) for bucket in found.buckets) == found.usd
    assert float(found.usd or 0) == pytest.approx(settlement.usd)
    for account, record in zip(settlement.accounts, records, strict=True):
        assert sum(purposes(account, record, complete).values()) == record.bill.total


lives = st.lists(
    st.tuples(
        st.floats(0, 1e6),
        st.lists(
            st.tuples(st.integers(10**8, 10**12), st.integers(0, 9), st.integers(0, 999)),
            min_size=1,
            max_size=9,
        ),
    ),
    min_size=1,
    max_size=5,
)


@given(lives)
def test_throughput_keeps_every_token_and_every_worker_s_time(
    workers: list[tuple[float, list[tuple[int, int, int]]]],
) -> None:
    beats, seconds = [], 0.0
    totals = np.zeros(2)
    for number, (start, pauses) in enumerate(workers):
        history, spent, rows, tokens = [], 0, 0, 0
        for pause, more_rows, more in pauses:
            spent, rows, tokens = spent + pause, rows + more_rows, tokens + more
            history.append(Moment(spent, rows, 2 * tokens, 0, tokens))
        record = WorkerRecord(
            worker=str(number),
            state="left",
            beat=1,
            usd_per_hour=None,
            bill=Bill(rows=spent),
            started="",
            history=tuple(history),
        )
        beats.append((record, start + spent / 1e9))
        seconds += spent / 1e9
        totals += rows, tokens
    found = throughput(beats)
    if not totals.any():
        assert found is None
        return
    assert found is not None
    width = found.seconds / len(found.rows)
    assert sum(found.rows) * width == pytest.approx(totals[0])
    assert sum(found.completion_tokens) * width == pytest.approx(totals[1])
    assert sum(found.prompt_tokens) * width == pytest.approx(2 * totals[1])
    assert sum(found.workers) * width == pytest.approx(seconds, rel=1e-6)
    assert found.seconds <= seconds * 1.3 + 1e-3


def test_a_pause_without_workers_is_cut_out() -> None:
    def life(worker: str, ended: float) -> tuple[WorkerRecord, float]:
        bill, history = Bill(rows=100 * SECOND), (Moment(100 * SECOND, 10, 10, 0, 500),)
        return (
            WorkerRecord(
                worker=worker,
                state="left",
                beat=1,
                usd_per_hour=None,
                bill=bill,
                started="",
                history=history,
            ),
            ended,
        )

    found = throughput([life("a", 1100.0), life("b", 90_100.0), life("c", 90_100.0)], spans=10)
    assert found is not None
    assert (found.started, found.seconds) == (1000.0, 200.0)
    [cut] = found.cuts
    assert (cut.at, cut.seconds) == (100.0, 88_900.0)
    assert found.completion_tokens == pytest.approx([5.0] * 5 + [10.0] * 5)
    assert found.workers == pytest.approx([1.0] * 5 + [2.0] * 5)


@given(st.lists(st.integers(0, 200_000), min_size=1, max_size=300))
def test_a_histogram_holds_every_length_in_its_bin(values: list[int]) -> None:
    found = histogram(Counter(values))
    assert found is not None
    assert sum(item.count for item in found.bins) == found.count == len(values)
    assert len(found.bins) <= 27
    for item in found.bins:
        last = found.longest if item.last is None else item.last
        assert item.count == sum(item.first <= value <= last for value in values)
    ordered = sorted(values)
    for share, value in ((0.1, found.p10), (0.5, found.p50), (0.9, found.p90), (1.0, found.longest)):
        assert value == ordered[max(0, int(np.ceil(share * len(values) - 1e-9)) - 1)]
    assert found.mean == pytest.approx(sum(values) / len(values))


@given(st.floats(1e-12, 1e12))
def test_an_axis_reaches_just_above_the_highest_value(highest: float) -> None:
    ticks, top = axis(highest)
    assert highest * (1 - 1e-9) <= top <= highest * 2.51
    assert 2 <= len(ticks) <= 6
    assert ticks[0].value == 0 and ticks[-1].value == pytest.approx(top)


@pytest.mark.skipif(browser.PROGRAM is None, reason="no Chromium is installed (apt-get install chromium)")
def test_in_a_browser_nothing_is_loaded_and_nothing_scrolls_sideways(done: Filled, tmp_path: Path) -> None:
    job = Filled(f"{done.folder.uri}-hostile", name=HOSTILE.replace(" ", ""))
    job.commit(0, failed={1: ("x" * 80, HOSTILE.replace(" ", "")), 2: ("bad_line", "y" * 3000)})
    job.beat(host="h" * 200, rows_done=10**12, completion_tokens=10**15)
    pages = {
        "done": page_of(done),
        "hostile": page_of(job),
        "empty": page_of(Filled(f"{done.folder.uri}-empty")),
    }
    with browser.browser(tmp_path / "profile") as page:
        for name, text in pages.items():
            path = tmp_path / f"{name}.html"
            path.write_text(text)
            for width in (375, 768, 1440):
                page.requested.clear()
                page.open(path, width, dark=width == 375)
                assert page.evaluate("document.scrollingElement.scrollWidth") == width, (name, width)
                assert page.evaluate("document.scripts.length") == 0
                assert page.requested == [path.as_uri()]
        # The text of both schemes has the contrast that is asked for of text: 4.5 to 1.
        for dark in (False, True):
            page.open(tmp_path / "done.html", 1440, dark)
            assert page.evaluate(CONTRAST) >= 4.5, f"dark: {dark}"
    assert page.complaints == []


# The lowest contrast between a text and what it stands on, by the formula of WCAG 2.
CONTRAST = """(() => {
  const level = (color) => {
    const [r, g, b] = color.match(/[\\d.]+/g).slice(0, 3).map(Number).map(v => v / 255)
      .map(v => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  let lowest = 21;
  for (const element of document.body.querySelectorAll('*')) {
    if (![...element.childNodes].some(node => node.nodeType === 3 && node.data.trim())) continue;
    if (element.closest('svg')) continue;
    let under = element;
    const clear = (item) => /rgba\\(.*, 0\\)|transparent/.test(getComputedStyle(item).backgroundColor);
    while (under && clear(under)) under = under.parentElement;
    const back = level(getComputedStyle(under || document.body).backgroundColor);
    const front = level(getComputedStyle(element).color);
    lowest = Math.min(lowest, (Math.max(back, front) + 0.05) / (Math.min(back, front) + 0.05));
  }
  return lowest;
})()"""


def run(*arguments: str) -> int:
    with pytest.raises(SystemExit) as left:
        cli.app(list(arguments))
    return int(left.value.code or 0)


def test_the_command_writes_the_page(
    done: Filled, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "page.html"
    assert run("report", done.folder.uri, "-o", str(path), "--json") == 0
    out, err = capfd.readouterr()
    assert json.loads(out) == {"uri": done.folder.uri, "output": str(path), "state": "done"}
    assert str(path) in err
    check_page(path.read_text())


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (lambda uri, path: [f"{uri}/none"], "there is no job at"),
        (lambda uri, path: [uri, "-o", str(path / "none" / "page.html")], "give another --output"),
    ],
)
def test_a_mistake_is_one_sentence(
    done: Filled,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    arguments: Callable[[str, Path], list[str]],
    words: str,
) -> None:
    assert run("report", *arguments(done.folder.uri, tmp_path)) == 78
    assert words in capfd.readouterr().err


def test_a_job_that_is_not_there() -> None:
    with pytest.raises(JobError, match="there is no job"):
        read_report(JobFolder(open_store("memory://reports/none")))


def test_the_report_reads_with_a_worker_that_changes_its_price(done: Filled) -> None:
    [first, second] = [record for record, _ in done.folder.read_workers()]
    done.folder.write_worker(replace(second, usd_per_hour=None))
    report = read_report(done.folder)
    assert not report.priced and report.breakdown.usd is None
    check_page(render_report(report))
    assert first.usd_per_hour is not None
