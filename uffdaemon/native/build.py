"""Builds the extension ``uffdaemon.native._native`` (cffi in API mode, abi3).

Run by setuptools through ``cffi_modules``; not imported at run time.
"""

from pathlib import Path

from cffi import FFI

HERE = Path("uffdaemon/native")
SOURCES = (
    "descriptor.c",
    "operations.c",
    "moves.c",
    "messages.c",
    "memory.c",
    "rules.c",
    "serve.c",
)

ffibuilder = FFI()
ffibuilder.cdef(
    """
    struct uffdaemon_operation {
        uint32_t code, error;
        uint64_t dst, src, length, mode, page_size, done, present;
    };
    struct page_region { uint64_t start, end, categories; };
    struct pm_scan_arg {
        uint64_t size, flags, start, end, walk_end, vec, vec_len, max_pages;
        uint64_t category_inverted, category_mask, category_anyof_mask, return_mask;
    };
    struct uffdaemon_port {
        int32_t fd, error;
        uint32_t rule_count, record_all, capacity, count, forwarded;
        uint32_t reread_limit, rereads, misses;
        uint64_t rules, records, last, reads, empty_reads;
        uint64_t counts[8][16];
        uint64_t latencies[64];
        uint64_t bytes[16];
        ...;
    };
    int uffdaemon_serve(struct uffdaemon_port *port);
    int uffdaemon_wait_open(void);
    int uffdaemon_wait_add(int epoll, int fd, uint64_t port);
    int uffdaemon_wait_remove(int epoll, int fd);
    int uffdaemon_wait(int epoll, int64_t timeout);
    void uffdaemon_execute(int fd, struct uffdaemon_operation *operations, size_t count);
    struct uffdaemon_copy {
        uint64_t dst, src, length;
        uint32_t flags, advice;
        uint64_t done;
        uint32_t error, stage;
    };
    uint64_t uffdaemon_move_many(int fd, const uint64_t *moves, uint64_t *done, size_t count,
                                 uint64_t mode, uint64_t low, uint64_t high);
    uint64_t uffdaemon_move(int fd, uint64_t dst, uint64_t src, uint64_t length, uint64_t mode);
    void uffdaemon_copy_and_release(int fd, int src_fd, struct uffdaemon_copy *copy);
    long uffdaemon_read(int fd, void *messages, size_t bytes, unsigned rereads);
    int uffdaemon_open_syscall(int user_mode_only);
    int uffdaemon_open_device(int user_mode_only);
    int uffdaemon_handshake(int fd, uint64_t *features, uint64_t *ioctls);
    int uffdaemon_register(int fd, uint64_t start, uint64_t length, uint64_t mode,
                           uint64_t *ioctls);
    int uffdaemon_unregister(int fd, uint64_t start, uint64_t length);
    int uffdaemon_pidfd_open(int pid);
    int uffdaemon_pidfd_getfd(int pidfd, int target);
    int uffdaemon_memfd_create(const char *name, uint64_t huge_page_size);
    int uffdaemon_map(int fd, uint64_t length, unsigned kind, uint64_t alignment,
                      uint64_t *start);
    int uffdaemon_unmap(uint64_t start, uint64_t length);
    int uffdaemon_protect(uint64_t start, uint64_t length);
    int uffdaemon_remap(uint64_t start, uint64_t length, uint64_t target);
    int uffdaemon_advise(uint64_t start, uint64_t length, int advice);
    int uffdaemon_mincore(uint64_t start, uint64_t length, unsigned char *vector);
    void uffdaemon_copy_memory(void *dst, const void *src, size_t length);
    void uffdaemon_touch(uint64_t start, uint64_t length, uint64_t step, int write);
    long uffdaemon_scan(int pagemap, struct pm_scan_arg *argument);
    """
)
ffibuilder.set_source(
    "uffdaemon.native._native",
    '#include "native.h"',
    sources=[str(HERE / name) for name in SOURCES],
    include_dirs=[str(HERE)],
    depends=[str(HERE / "native.h"), str(HERE / "uapi.h")],
    extra_compile_args=["-std=gnu11", "-O2", "-Wall", "-Wextra", "-fvisibility=hidden"],
    py_limited_api=True,
)
