"""The pytest plugin, in pytest runs of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.metadata import entry_points

import pytest

pytest_plugins = ["pytester"]

INSTALLED = any(entry.value == "iommufd.testing.plugin" for entry in entry_points(group="pytest11"))


def run(pytester: pytest.Pytester, source: str, *options: str) -> pytest.RunResult:
    pytester.makepyfile(source)
    plugin = () if INSTALLED else ("-p", "iommufd.testing.plugin")
    lean = ("-p", "no:xdist", "-p", "no:cacheprovider", "-p", "no:hypothesispytest")
    return pytester.runpytest_subprocess(*plugin, *lean, "--strict-markers", *options)


def test_fixtures_and_what_leaks_is_named(pytester: pytest.Pytester) -> None:
    done = run(
        pytester,
        """
        import mmap, os, sys
        import pytest
        from iommufd import Machine
        from iommufd.testing import MockDevice

        def test_tidy(iommufd_context):
            with iommufd_context.alloc_ioas() as ioas:
                ioas.map(mmap.mmap(-1, 4096))

        def test_untidy(iommufd_context):
            ioas = iommufd_context.alloc_ioas()
            ioas.map(mmap.mmap(-1, 4096), 0x1000000)
            iommufd_context.kept = MockDevice(iommufd_context, ioas)

        def test_a_queue_is_left_open(iommufd_context):
            iommufd_context.backend.open("/dev/iommu", os.O_RDWR)

        def test_that_fails_is_not_blamed_twice(iommufd_context):
            iommufd_context.alloc_ioas()
            assert False

        @pytest.mark.iommufd(leaks=False)
        def test_whose_leaks_are_its_own_affair(iommufd_context):
            iommufd_context.alloc_ioas()

        def test_machine_and_context_belong_together(iommufd_machine, iommufd_context):
            with iommufd_context.alloc_ioas():
                assert len(iommufd_machine.snapshot().contexts) == 1

        def test_a_program_left_running(iommufd_machine):
            iommufd_machine.popen(["sleep", "60"])

        @pytest.mark.iommufd(machine="default", kernel="6.6")
        def test_another_machine(iommufd_machine):
            assert iommufd_machine.name == "default"
            assert iommufd_machine.world.kernel == (6, 6)

        def built():
            machine = Machine("built")
            machine.add_device("0000:01:00.0")
            return machine

        @pytest.mark.iommufd(machine=built)
        class TestBuilt:
            def test_a_machine_of_ones_own(self, iommufd_context):
                with iommufd_context.open_device("0000:01:00.0") as device:
                    assert device.number > 0
        """,
        "-W",
        "error",
    )
    done.assert_outcomes(passed=8, failed=1, errors=3)
    done.stdout.fnmatch_lines(
        [
            "*ERROR at teardown of test_untidy*",
            "*IOAS 1 was never destroyed*",
            "*IOAS 1 still maps [[]0x1000000, 0x1000fff], 4 KiB*pinned for DMA*",
            "*ERROR at teardown of test_a_queue_is_left_open*",
            "*descriptor * (/dev/iommu) was never closed*",
            "*ERROR at teardown of test_a_program_left_running*",
            "*'sleep', '60'* is still running*",
        ]
    )


KERNEL = pytest.param("kernel", marks=pytest.mark.oracle)


@pytest.mark.parametrize("system", ["software", KERNEL])
def test_backends(pytester: pytest.Pytester, system: str) -> None:
    """On a system without /dev/iommu the kernel's half is skipped; on one with it, it runs, and leaks are named."""
    done = run(
        pytester,
        """
        import mmap
        import pytest

        @pytest.mark.iommufd(backend="both")
        def test_on_both(iommufd_context, iommufd_backend):
            assert iommufd_context.backend.name == iommufd_backend
            with iommufd_context.alloc_ioas() as ioas:
                assert ioas.map(mmap.mmap(-1, 4096), 0x100000).iova == 0x100000

        @pytest.mark.iommufd(backend="kernel")
        def test_on_the_kernel(iommufd_context):
            iommufd_context.alloc_ioas()
        """,
        "-rs",
        "-v",
    )
    done.stdout.fnmatch_lines(["*test_on_both[[]software[]] PASSED*"])
    if system == "software" and not os.access("/dev/iommu", os.R_OK | os.W_OK):
        done.assert_outcomes(passed=1, skipped=2)
    else:
        done.assert_outcomes(passed=3, errors=1)
        left = ["the test left alive:", "  <IOAS 1: * was never closed"]
        done.stdout.fnmatch_lines(["*test_on_both[[]kernel[]] PASSED*", *left])


WRONG = (
    ('backend="hardware"', "iommufd_context", "there is no backend 'hardware' to test on"),
    ('"both"', "iommufd_context", "named arguments only"),
    ('colour="red"', "iommufd_context", "no argument 'colour'; it has: backend, machine, kernel, leaks"),
    ('machine="nowhere"', "iommufd_machine", "there is no machine 'nowhere'"),
    ("machine=3", "iommufd_machine", "a name, a file or a function, not 3"),
    ("machine=dict", "iommufd_machine", "made a dict, not a Machine"),
    ('kernel="6.1"', "iommufd_machine", "Linux 6.1 has no /dev/iommu"),
    ('backend="both"', "iommufd_machine, iommufd_context", "runs on software only"),
)


def test_a_wrong_marker_is_one_sentence(pytester: pytest.Pytester) -> None:
    for number, (marker, arguments, _) in enumerate(WRONG):
        source = f"import pytest\n@pytest.mark.iommufd({marker})\ndef test({arguments}): pass\n"
        pytester.makepyfile(**{f"test_{number}": source})
    done = run(pytester, "", "--continue-on-collection-errors")
    said = done.stdout.str() + done.stderr.str()
    assert "passed" not in said
    assert [sentence for _, _, sentence in WRONG if sentence not in said] == []


def test_who_does_not_use_it_pays_nothing() -> None:
    code = "import sys, iommufd.testing.plugin; print(*[m for m in sys.modules if m.startswith('iommufd')])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert set(done.stdout.split()) == {"iommufd", "iommufd.testing", "iommufd.testing.plugin"}
