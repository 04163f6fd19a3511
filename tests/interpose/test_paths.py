"""Every path system call by which a program may look at a device of the machine (interposition 3)."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.interpose.harness import Compile, Supervised

pytestmark = pytest.mark.interposed


def test_stat_access_readlink(supervised: Supervised) -> None:
    supervised.python("""
        for path in "/dev/iommu /dev/vfio/vfio /dev//iommu /dev/./iommu /dev/vfio/../iommu /../dev/iommu".split():
            assert stat.S_ISCHR(os.stat(path).st_mode) and stat.S_ISCHR(os.lstat(path).st_mode)
            assert os.access(path, os.R_OK | os.W_OK) and os.path.exists(path) and not os.access(path, os.X_OK)
            assert os.access(path, os.R_OK, effective_ids=True)
            fails(errno.EINVAL, os.readlink, path)
            fails(errno.ENOTDIR, os.stat, path + "/")
            fails(errno.ENOTDIR, os.stat, path + "/x")
            fails(errno.ENOTDIR, os.open, path, os.O_RDONLY | os.O_DIRECTORY)
            fails(errno.EEXIST, os.open, path, os.O_RDWR | os.O_CREAT | os.O_EXCL)
            fails(errno.ENODATA, os.getxattr, path, "user.x")
            assert os.listxattr(path) == []
            os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW))
        assert stat.S_ISDIR(os.stat("/dev/vfio").st_mode) and os.path.isdir("/dev/vfio/")
        fails(errno.ENOENT, os.stat, "/dev/vfio/0")
        fails(errno.ENOENT, os.stat, "/dev/iommu2")
        fails(errno.ENOENT, os.open, "/dev/vfio/0", os.O_RDWR)
        fails(errno.EISDIR, os.open, "/dev/vfio", os.O_RDWR)
    """)


def test_relative_paths_and_links(supervised: Supervised, tmp_path: Path) -> None:
    supervised.python(
        """
        here = sys.argv[1]
        os.chdir(here)
        os.symlink("/dev/iommu", "absolute")
        os.symlink("../" * 30 + "dev/iommu", "relative")
        os.symlink("absolute", "twice")
        os.symlink("/dev/vfio", "folder")
        os.symlink("loop", "loop")
        os.mkdir("sub")
        for path in ("absolute", "relative", "twice", "sub/../twice", "folder/vfio", here + "/absolute", "./absolute"):
            assert stat.S_ISCHR(os.stat(path).st_mode), path
            fd = os.open(path, os.O_RDWR)
            assert fcntl.ioctl(fd, COUNT) == 1
            os.close(fd)
        assert stat.S_ISLNK(os.lstat("absolute").st_mode) and os.readlink("absolute") == "/dev/iommu"
        fails(errno.ELOOP, os.open, "absolute", os.O_RDWR | os.O_NOFOLLOW)
        fails(errno.ELOOP, os.stat, "loop")
        os.chdir("/dev")
        assert fcntl.ioctl(os.open("iommu", os.O_RDWR), COUNT) == 1
        assert fcntl.ioctl(os.open("vfio/vfio", os.O_RDWR), COUNT) == 1
        folder = os.open("/dev", os.O_RDONLY | os.O_DIRECTORY)
        assert fcntl.ioctl(os.open("iommu", os.O_RDWR, dir_fd=folder), COUNT) == 1
        assert stat.S_ISCHR(os.stat("iommu", dir_fd=folder).st_mode)
        assert stat.S_ISCHR(os.stat("null", dir_fd=folder).st_mode)
        os.close(os.open("null", os.O_RDWR, dir_fd=folder))
        own = os.open("/dev/vfio", os.O_RDONLY | os.O_DIRECTORY)
        assert fcntl.ioctl(os.open("vfio", os.O_RDWR, dir_fd=own), COUNT) == 1
        assert fcntl.ioctl(os.open("../iommu", os.O_RDWR, dir_fd=own), COUNT) == 1
        for up in ("/dev/vfio/..", "/dev/vfio/../."):
            assert os.stat(up).st_ino == os.stat("/dev").st_ino and os.access(up, os.R_OK), up
        assert os.stat("/dev/vfio/../null").st_rdev == os.stat("/dev/null").st_rdev
        fails(errno.ENOENT, os.stat, "/dev/vfio/../vfio2")
        fails(errno.ENOENT, os.chdir, "/dev/vfio")  # docs/deviations.md
        os.fchdir(own)
        assert stat.S_ISCHR(os.stat("vfio").st_mode)
    """,
        str(tmp_path),
    )


def test_directories_list_what_the_host_and_the_machine_have(supervised: Supervised) -> None:
    supervised.python("""
        import glob
        assert {"iommu", "vfio", "null", "zero"} <= set(os.listdir("/dev")), os.listdir("/dev")
        assert len(os.listdir("/dev")) == len(set(os.listdir("/dev")))
        assert glob.glob("/dev/iomm*") == ["/dev/iommu"]
        kinds = {entry.name: entry for entry in os.scandir("/dev")}
        assert not kinds["iommu"].is_dir() and kinds["vfio"].is_dir() and not kinds["iommu"].is_file()
        assert os.listdir("/dev/vfio") == ["vfio"]
        fd = os.open("/dev", os.O_RDONLY | os.O_DIRECTORY)
        assert "iommu" in os.listdir(fd) and "iommu" in os.listdir(fd)  # rewound by listdir
        assert os.fstat(fd).st_ino == os.stat("/dev").st_ino
        assert sorted(os.listdir("/sys/class/iommu-fake")) == ["first", "unit0"]
        assert open("/sys/class/iommu-fake/first/name").read() == "unit\\n"
        assert os.path.realpath("/sys/class/iommu-fake/first") == "/sys/class/iommu-fake/unit0"
        assert os.readlink("/sys/class/iommu-fake/first") == "unit0"
        assert "iommu-fake" in os.listdir("/sys/class")
        fails(errno.EACCES, os.open, "/sys/class/iommu-fake/unit0/name", os.O_RDWR)
        fails(errno.ENOENT, os.stat, "/sys/class/iommu-fake/unit1")
        listed = subprocess.run(["ls", "-l", "/dev/iommu", "/dev/vfio"], capture_output=True, check=True).stdout
        assert b"10, 125" in listed and b"10, 196" in listed, listed
    """)


def test_what_the_host_has_stays_as_it_is(supervised: Supervised, tmp_path: Path) -> None:
    supervised.python(
        """
        here = sys.argv[1]
        open(here + "/iommu", "w").write("mine")
        assert open(here + "/iommu").read() == "mine"
        os.mkdir(here + "/vfio")
        assert os.listdir(here + "/vfio") == []
        os.chdir(here)
        assert open("iommu").read() == "mine"
        fails(errno.ENOENT, os.stat, here + "/none/iommu")
        assert libc.open(ctypes.c_void_p(8), 0) == -1 and ctypes.get_errno() == errno.EFAULT
        fails(errno.ENAMETOOLONG, os.stat, "/" + "x/" * 3000)
        assert os.stat("/proc/self/status") and open("/proc/self/stat").read().split()[0] == str(os.getpid())
        assert os.readlink("/proc/self") == str(os.getpid())
        assert open("/dev/null", "rb").read() == b"" and open("/proc/self/maps").read()
        assert sorted(os.listdir("/proc/self/fd"))
    """,
        str(tmp_path),
    )


LOOKS = r"""
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <linux/openat2.h>
#include <stdio.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/sysmacros.h>
#include <unistd.h>
#define CHECK(x) do { if (!(x)) { printf("line %d: %s (errno %d)\n", __LINE__, #x, errno); return 1; } } while (0)
int main(void)
{
    struct stat st;
    struct statx sx;
    struct open_how how = { .flags = O_RDWR | O_CLOEXEC };
    int fd = open("/dev/iommu", O_RDWR), dir;
    CHECK(fd >= 0);
    CHECK(ioctl(fd, 0x3b81, 0) == 1);
    CHECK(fstat(fd, &st) == 0 && S_ISCHR(st.st_mode) && st.st_rdev == makedev(10, 125));
    CHECK(statx(fd, "", AT_EMPTY_PATH, STATX_ALL, &sx) == 0 && S_ISCHR(sx.stx_mode) && sx.stx_rdev_major == 10);
    CHECK(statx(AT_FDCWD, "/dev/iommu", 0, STATX_ALL, &sx) == 0 && sx.stx_rdev_minor == 125);
    CHECK(fstatat(fd, "", &st, AT_EMPTY_PATH) == 0 && S_ISCHR(st.st_mode));
#ifdef SYS_stat
    CHECK(syscall(SYS_stat, "/dev/iommu", &st) == 0 && S_ISCHR(st.st_mode));
    CHECK(syscall(SYS_lstat, "/dev/iommu", &st) == 0 && S_ISCHR(st.st_mode));
    CHECK(syscall(SYS_access, "/dev/iommu", R_OK) == 0);
    CHECK(syscall(SYS_open, "/dev/iommu", O_RDWR) >= 0);
    CHECK(syscall(SYS_creat, "/dev/iommu", 0600) >= 0);
#endif
    CHECK(syscall(SYS_fstat, fd, &st) == 0 && S_ISCHR(st.st_mode));
    CHECK(syscall(SYS_faccessat, AT_FDCWD, "/dev/iommu", R_OK) == 0);
    CHECK(syscall(SYS_faccessat2, AT_FDCWD, "/dev/iommu", R_OK, AT_EACCESS) == 0);
    CHECK(syscall(SYS_openat2, AT_FDCWD, "/dev/iommu", &how, sizeof(how)) >= 0);
    dir = open("/dev", O_DIRECTORY);
    how.resolve = RESOLVE_BENEATH;
    CHECK(syscall(SYS_openat2, dir, "iommu", &how, sizeof(how)) >= 0);
    CHECK(symlinkat("/dev/iommu", AT_FDCWD, "link-to-iommu") == 0 || errno == EEXIST);
    how.resolve = RESOLVE_NO_SYMLINKS;
    errno = 0;
    CHECK(syscall(SYS_openat2, AT_FDCWD, "link-to-iommu", &how, sizeof(how)) == -1 && errno == ELOOP);
    how.flags = O_RDWR | (1ull << 40);
    errno = 0;
    CHECK(syscall(SYS_openat2, AT_FDCWD, "/dev/iommu", &how, sizeof(how)) == -1 && errno == EINVAL);
    CHECK(fstat(fd, (void *)8) == -1 && errno == EFAULT);
    puts("looked");
    return 0;
}
"""


@pytest.mark.parametrize("options", [(), ("-static",)], ids=["dynamic", "static"])
def test_every_form_of_looking(supervised: Supervised, compiled: Compile, tmp_path: Path, options: tuple[str]) -> None:
    done = supervised.run([compiled(LOOKS, *options)], cwd=tmp_path)
    assert done.out == "looked\n"


RAW = r"""
/* no libc at all: system calls by hand */
static long call(long n, long a, long b, long c)
{
    long r;
#ifdef __x86_64__
    __asm__ volatile("syscall" : "=a"(r) : "a"(n), "D"(a), "S"(b), "d"(c) : "rcx", "r11", "memory");
#else
    register long x8 __asm__("x8") = n, x0 __asm__("x0") = a, x1 __asm__("x1") = b, x2 __asm__("x2") = c;
    __asm__ volatile("svc 0" : "+r"(x0) : "r"(x8), "r"(x1), "r"(x2) : "memory");
    r = x0;
#endif
    return r;
}
#ifdef __x86_64__
enum { OPENAT = 257, IOCTL = 16, CLOSE = 3, EXIT = 231 };
#else
enum { OPENAT = 56, IOCTL = 29, CLOSE = 57, EXIT = 94 };
#endif
void _start(void)
{
    long fd = call(OPENAT, -100, (long)"/dev/iommu", 2);
    long count = call(IOCTL, fd, 0x3b81, 0) + call(IOCTL, fd, 0x3b81, 0);
    call(CLOSE, fd, 0, 0);
    call(EXIT, count + 10 * call(IOCTL, fd, 0x3b81, 0), 0, 0);
}
"""


def test_a_program_without_a_libc(supervised: Supervised, compiled: Compile) -> None:
    program = compiled(RAW, "-nostdlib", "-static", "-fno-stack-protector", "-O0")
    done = supervised.run([program], code=(3 - 90) % 256)  # 1 + 2, then EBADF times ten
    assert done.log == ["opened", "released 2"]
