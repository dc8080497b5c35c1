import signal
import threading

import pytest

from shike_fast.engine.signals import GracefulStop


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_first_signal_only_asks(number):
    before = signal.getsignal(number)
    with GracefulStop() as stop:
        assert not stop.requested
        assert stop.number == 0
        signal.raise_signal(number)
        assert stop.requested
        assert stop.number == int(number)
    assert signal.getsignal(number) is before


def test_second_ctrl_c_interrupts_at_once():
    with pytest.raises(KeyboardInterrupt), GracefulStop():
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)


def test_handlers_are_put_back_after_an_error():
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(RuntimeError), GracefulStop():
        raise RuntimeError
    assert signal.getsignal(signal.SIGTERM) is before


def test_outside_the_main_thread_nothing_changes():
    before = signal.getsignal(signal.SIGTERM)
    seen = []

    def enter():
        with GracefulStop() as stop:
            seen.append((stop.requested, signal.getsignal(signal.SIGTERM)))

    thread = threading.Thread(target=enter)
    thread.start()
    thread.join()
    assert seen == [(False, before)]
