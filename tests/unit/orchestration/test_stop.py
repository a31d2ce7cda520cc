"""The first signal asks, the second insists."""

import os
import select
import signal
import threading

import pytest

from lem.base.errors import Interrupted
from lem.orchestration.schedule import StopRequest


@pytest.fixture
def stop():
    request = StopRequest()
    yield request
    request.close()


def test_no_stop_before_a_signal(stop):
    assert not stop.is_set()
    assert stop.signum is None
    assert select.select([stop.fileno()], [], [], 0)[0] == []


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_first_signal_sets_the_flag_and_wakes_waits_for_good(stop, signum):
    with stop.installed():
        os.kill(os.getpid(), signum)
        assert stop.is_set()
        assert stop.signum == signum
        assert select.select([stop.fileno()], [], [], 0)[0] == [stop.fileno()]
        assert stop.wait(1000) is True
        assert stop.wait(1000) is True


def test_second_signal_raises_with_its_exit_code(stop):
    with stop.installed():
        os.kill(os.getpid(), signal.SIGINT)
        with pytest.raises(Interrupted) as caught:
            os.kill(os.getpid(), signal.SIGTERM)
            signal.sigtimedwait([], 1)  # a place for the handler to run
    assert caught.value.code == 143


def test_first_signal_alone_is_acknowledged(stop):
    heard = []
    with stop.installed(lambda: heard.append(stop.signum)):
        os.kill(os.getpid(), signal.SIGTERM)
        assert heard == [signal.SIGTERM]
        with pytest.raises(Interrupted):
            os.kill(os.getpid(), signal.SIGTERM)
            signal.sigtimedwait([], 1)
    assert heard == [signal.SIGTERM]


def test_wait_ends_at_once_when_the_stop_comes_from_another_thread(stop):
    threading.Thread(target=stop.request, args=(signal.SIGTERM,)).start()
    assert stop.wait(1000) is True


def test_wait_without_a_stop_runs_its_time(stop):
    assert stop.wait(0.001) is False
    assert stop.wait(0) is False


def test_handlers_are_put_back(stop):
    before = signal.getsignal(signal.SIGINT)
    with stop.installed():
        assert signal.getsignal(signal.SIGINT) is not before
    assert signal.getsignal(signal.SIGINT) is before
