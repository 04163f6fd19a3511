"""The object table of one context (kernel: struct iommufd_object and its xarray).

Invariants (core 2):
* IDs are the lowest free number >= 1; an ID is taken when creation starts and is free again when creation fails.
* ``users`` decides whether DESTROY is EBUSY, ``wait`` whether destruction must wait for stragglers. Both start at 1,
  owned by the table. A lookup during an ioctl takes both; long-lived links take ``users`` only.
* Destroy never fails: whatever an object needs to go away it already has.
* All methods that say "locked" want ``World.lock`` held; the others take it.
"""

from __future__ import annotations

import errno
from heapq import heappop, heappush
from typing import TYPE_CHECKING, ClassVar, TypeVar

from iommufd.errors import KernelError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from iommufd.engine.context import Context
    from iommufd.engine.world import World

MAX_ID = 2**31 - 1
RESERVED, PUBLISHED, REMOVED = 0, 1, 2
STRAGGLER_SECONDS = 60.0


class Object:
    """One numbered object. Subclasses set ``kind`` (the kernel's name, for sentences and listings)."""

    __slots__ = ("context", "id", "state", "users", "wait")
    kind: ClassVar[str] = "OBJECT"

    def __init__(self, context: Context) -> None:
        self.context = context
        self.id = 0
        self.users = 1
        self.wait = 1
        self.state = RESERVED

    def destroy(self) -> None:
        """Releases everything the object holds. Called once, without the lock, after it left the table; never fails."""

    def abort(self) -> None:
        """Undoes a creation that failed before publication; by default the same as :meth:`destroy`."""
        self.destroy()

    def pre_destroy(self) -> None:
        """Runs when a driver removes the object while somebody still waits on it (core 2.6)."""

    def __repr__(self) -> str:
        return f"<{self.kind} {self.id} users={self.users}>"


class _Tombstone(Object):
    __slots__ = ()
    kind = "TOMBSTONE"


T = TypeVar("T", bound=Object)


class ObjectTable:
    """ID -> object. Empty means nothing reserved, published or entombed."""

    __slots__ = ("_free", "_lock", "_next", "_objects", "_world")

    def __init__(self, world: World) -> None:
        self._world = world
        self._lock = world.lock
        self._objects: dict[int, Object] = {}
        self._free: list[int] = []  # freed numbers below _next, a heap
        self._next = 1

    def __len__(self) -> int:
        return len(self._objects)

    def __iter__(self) -> Iterator[Object]:
        """Every published object, ascending by id, from a snapshot."""
        with self._world.lock:
            return iter(self.published_locked())

    def published_locked(self) -> list[Object]:
        """Every published object, ascending by id."""
        objects = sorted(self._objects.items())
        return [o for _, o in objects if o.state == PUBLISHED and not isinstance(o, _Tombstone)]

    @property
    def tombstones(self) -> int:
        with self._world.lock:
            return sum(isinstance(o, _Tombstone) for o in self._objects.values())

    def reserve(self, obj: T) -> T:
        """Gives ``obj`` the lowest free ID; it is not yet visible. EBUSY when all 2**31-1 are taken (core 2.1)."""
        with self._world.lock:
            if self._free:
                number = heappop(self._free)
            elif self._next <= MAX_ID:
                number = self._next
                self._next += 1
            else:
                raise KernelError(errno.EBUSY, f"all {MAX_ID} object ids are taken")
            obj.id = number
            self._objects[number] = obj
        return obj

    def publish(self, obj: Object) -> None:
        """Makes a reserved object visible to lookups."""
        obj.state = PUBLISHED

    def abort(self, obj: Object) -> None:
        """Undoes ``reserve`` (and the object's own half-made state) after a failed creation."""
        obj.abort()
        with self._world.lock:
            self._release_locked(obj)

    def _release_locked(self, obj: Object) -> None:
        obj.state = REMOVED
        del self._objects[obj.id]
        if not self._objects:  # all numbers are free again
            self._free.clear()
            self._next = 1
        else:
            heappush(self._free, obj.id)

    def take(self, number: int, kind: type[T]) -> T | None:
        """As :meth:`get` for an object of exactly this type; None when it must be looked at more closely."""
        lock = self._lock
        lock.acquire()  # half the price of a with statement, twice a call
        try:
            obj = self._objects.get(number)
            if obj is not None and type(obj) is kind and obj.state == PUBLISHED and obj.wait > 0:
                obj.users += 1
                obj.wait += 1
                return obj
            return None
        finally:
            lock.release()

    def get(self, number: int, *types: type[Object]) -> Object:
        """Looks up and takes ``users`` and ``wait``; ENOENT when absent, unpublished, entombed or of another type."""
        with self._world.lock:
            obj = self._objects.get(number)
            if obj is not None and obj.state == PUBLISHED and obj.wait > 0 and (not types or isinstance(obj, types)):
                obj.users += 1
                obj.wait += 1
                return obj
            found = obj.kind if obj is not None and obj.state == PUBLISHED and type(obj) is not _Tombstone else None
        wanted = " or ".join(t.kind for t in types) or "object"
        if found is None:
            raise KernelError(errno.ENOENT, f"there is no {wanted} with id {number}")
        raise KernelError(errno.ENOENT, f"id {number} is of type {found}, not {wanted}")

    def put(self, obj: Object) -> None:
        """Drops what :meth:`get` took."""
        lock = self._lock
        lock.acquire()
        try:
            obj.users -= 1
            obj.wait -= 1
            if obj.wait == 0:
                self._world.changed.notify_all()
        finally:
            lock.release()

    def destroy(self, number: int) -> None:
        """IOMMU_DESTROY (core 2.5)."""
        world = self._world
        with world.lock:
            obj = self._objects.get(number)
            if obj is None or obj.state != PUBLISHED or type(obj) is _Tombstone:  # core 2.5 row 1
                raise KernelError(errno.ENOENT, f"there is no object with id {number}")
            if obj.users != 1:  # core 2.5 row 2
                raise KernelError(errno.EBUSY, f"{obj.kind} {number} is in use {obj.users - 1} time(s)")
            self._remove_locked(obj)
        self._drain(obj)
        obj.destroy()

    def destroy_if_idle(self, obj: Object) -> bool:
        """Destroys ``obj`` if only the table holds it (automatic HWPTs, core 2.7); whether it did."""
        with self._world.lock:
            if obj.state != PUBLISHED or obj.users != 1:
                return False
            self._remove_locked(obj)
        self._drain(obj)
        obj.destroy()
        return True

    def remove_by_driver(self, obj: Object, *, users: int = 1) -> None:
        """Driver-side removal (core 2.6): drops the table's ``wait``, lets stragglers go, drops the driver's ``users``.

        An object that still has other holders afterwards stays until the context is torn down."""
        world = self._world
        with world.lock:
            obj.wait -= 1
            waiting = obj.wait != 0
        if waiting:
            obj.pre_destroy()
            with world.lock:
                world.changed.wait_for(lambda: obj.wait == 0, STRAGGLER_SECONDS)
        with world.lock:
            obj.users -= users
            if obj.users != 1:
                obj.wait += 1
                return
            obj.wait = 1
            self._remove_locked(obj)
        self._drain(obj)
        obj.destroy()

    def entomb(self, obj: Object) -> None:
        """Removes ``obj`` but keeps its ID out of use until the context goes (core 2.6); the object is destroyed.

        An object somebody else has removed meanwhile is left to him."""
        world = self._world
        with world.lock:
            if obj.state != PUBLISHED:
                return
            obj.state = REMOVED
            tombstone = _Tombstone(obj.context)
            tombstone.id = obj.id
            self._objects[obj.id] = tombstone
        obj.destroy()

    def _remove_locked(self, obj: Object) -> None:
        self._release_locked(obj)
        obj.users -= 1
        obj.wait -= 1

    def _drain(self, obj: Object) -> None:
        if obj.wait > 0:  # core 2.5 row 4: stragglers that dropped users but not yet wait
            with self._world.lock:
                self._world.changed.wait_for(lambda: obj.wait <= 0, STRAGGLER_SECONDS)

    def teardown(self) -> None:
        """The file is gone (core 2.8): ascending passes, leaves first, until nothing but tombstones is left."""
        while True:
            with self._world.lock:
                numbers = sorted(n for n, o in self._objects.items() if type(o) is not _Tombstone)
            if not numbers:
                break
            progress = False
            for number in numbers:
                with self._world.lock:
                    obj = self._objects.get(number)
                    if obj is None or obj.users != 1:
                        continue
                    self._remove_locked(obj)
                obj.destroy()
                progress = True
            if not progress:
                break  # a holder outside the table: a bug in a driver, nothing can be freed any more
        with self._world.lock:
            self._objects.clear()
