"""Where memory of one size lies that is asked for and freed in turn, as the scratch of steps is.

    python tests/check_place.py
    GLIBC_TUNABLES=glibc.malloc.tcache_count=0 python tests/check_place.py     without thread caches

The memory is aligned, as XLA asks for it, under the options that `tune_for_cpu` sets. Something
stands behind its first place. Prints how many new places there were, each of which a process keeps.
"""
import ctypes
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
from lib.hardware import tune_malloc

SIZE = 100 * 2**20  # bytes
BEHIND = 2**22  # bytes: no free place is as large but that behind the first
ALIGNED = 64  # to so many
TURNS = 20


def aligned(library: ctypes.CDLL) -> int:
    """The address of SIZE bytes; nothing of them is touched."""
    place = ctypes.c_void_p()
    library.posix_memalign(ctypes.byref(place), ctypes.c_size_t(ALIGNED), ctypes.c_size_t(SIZE))
    return place.value


def main():
    """Ask, put something behind the first place, and ask again and again."""
    tune_malloc()
    library = ctypes.CDLL(None)
    library.malloc.restype = ctypes.c_void_p
    first = aligned(library)
    library.malloc(BEHIND)
    places = [first]
    for _ in range(TURNS):
        library.free(ctypes.c_void_p(places[-1]))
        places.append(aligned(library))
    print(f"{len(set(places))} places in {TURNS} turns")


if __name__ == "__main__":
    main()
