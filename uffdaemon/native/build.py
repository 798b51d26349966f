"""Builds the extension ``uffdaemon.native._native``: cffi in API mode, abi3 where there is a GIL.

Run by setuptools through ``cffi_modules``; not imported at run time.
"""

import sysconfig
from pathlib import Path

from cffi import FFI

HERE = Path("uffdaemon/native")
SOURCES = (
    "base.c",
    "text.c",
    "alarm.c",
    "grace.c",
    "pages.c",
    "descriptor.c",
    "mapping.c",
    "messages.c",
    "operations.c",
    "moves.c",
    "queue.c",
    "waitqueue.c",
    "table.c",
    "snapshot.c",
    "port.c",
    "postponed.c",
    "reading.c",
    "rules.c",
    "events.c",
    "affinity.c",
    "pace.c",
    "journal.c",
    "serve.c",
    "back_pressure.c",
    "execute.c",
    "epoll.c",
    "resolver.c",
    "sigaction.c",
    "sigbus.c",
    "stall.c",
    "watchdog.c",
)

ffibuilder: FFI = FFI()
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
    struct uffdaemon_queue {
        uint64_t count, limit, forwarded, since, outstanding_since;
        uint32_t shortages;
        ...;
    };
    struct uffdaemon_port {
        int32_t fd, error;
        uint32_t record_all, rereads;
        uint64_t reads, empty_reads, events;
        uint32_t postponed;
        uint64_t counts[8][16];
        uint64_t latencies[64];
        uint64_t bytes[16];
        struct uffdaemon_queue queue;
        ...;
    };
    struct uffdaemon_record { ...; };
    struct uffdaemon_rule { ...; };
    struct uffdaemon_resolver;
    struct uffdaemon_pages;
    struct uffdaemon_port *uffdaemon_port_new(int fd, unsigned reread_limit, int notify);
    void uffdaemon_port_free(struct uffdaemon_port *port);
    long uffdaemon_port_dequeue(struct uffdaemon_port *port, struct uffdaemon_record *records,
                             size_t capacity);
    int uffdaemon_port_publish(struct uffdaemon_port *port, const struct uffdaemon_rule *rules,
                               size_t count, uint64_t events);
    void uffdaemon_port_close_spare(struct uffdaemon_port *port);
    void uffdaemon_port_withdraw(struct uffdaemon_port *port);
    void uffdaemon_port_withdraw_pages(struct uffdaemon_port *port,
                                       const struct uffdaemon_pages *pages);
    void uffdaemon_port_withdraw_source(struct uffdaemon_port *port, uint64_t start, uint64_t end);
    struct uffdaemon_journal { uint64_t *kept; ...; };
    struct uffdaemon_journal *uffdaemon_journal_open(int fd, uint64_t offset, uint64_t number,
                                                     int keeper, int *error);
    void uffdaemon_journal_close(struct uffdaemon_journal *journal);
    void uffdaemon_port_set_journal(struct uffdaemon_port *port,
                                    struct uffdaemon_journal *journal);
    void uffdaemon_port_saved(struct uffdaemon_port *port, uint64_t place);
    void uffdaemon_port_expect_release(struct uffdaemon_port *port, uint64_t start, uint64_t end);
    void uffdaemon_port_end_release(struct uffdaemon_port *port, uint64_t start, uint64_t end);
    void uffdaemon_port_end_batch(struct uffdaemon_port *port);
    void uffdaemon_port_settle(struct uffdaemon_port *port);
    void uffdaemon_port_execute(struct uffdaemon_port *port,
                               struct uffdaemon_operation *operations, size_t count,
                               uint64_t events);
    int uffdaemon_serve(struct uffdaemon_port *port);
    void uffdaemon_port_hand_over(struct uffdaemon_port *port);
    int uffdaemon_epoll_open(void);
    int uffdaemon_epoll_add(int epoll, int fd, uint64_t port);
    int uffdaemon_epoll_remove(int epoll, int fd);
    int uffdaemon_epoll_wait(int epoll, int64_t timeout, struct uffdaemon_port **hot);
    struct uffdaemon_resolver *uffdaemon_resolver_start(int *error);
    int uffdaemon_resolver_add(struct uffdaemon_resolver *resolver, struct uffdaemon_port *port);
    void uffdaemon_resolver_remove(struct uffdaemon_resolver *resolver,
                                   struct uffdaemon_port *port);
    void uffdaemon_resolver_stop(struct uffdaemon_resolver *resolver);
    int uffdaemon_resolver_thread(const struct uffdaemon_resolver *resolver);
    int uffdaemon_sigbus_add(struct uffdaemon_port *port);
    void uffdaemon_sigbus_remove(struct uffdaemon_port *port);
    void uffdaemon_port_wake(struct uffdaemon_port *port, uint64_t start, uint64_t length);
    void uffdaemon_sigaction_ignore(int number);
    struct uffdaemon_watch;
    struct uffdaemon_watch *uffdaemon_watch_add(int fd, struct uffdaemon_port *port,
                                                uint64_t after, unsigned then, int signal,
                                                const char *name, int *error);
    void uffdaemon_stall_wake(const struct uffdaemon_watch *watch, uint64_t start,
                              uint64_t length);
    void uffdaemon_stall_set_stack_pipe(int fd);
    void uffdaemon_watch_remove(struct uffdaemon_watch *watch);
    struct uffdaemon_pages_storage { uint32_t any_discarded; ...; };
    struct uffdaemon_pages {
        uint64_t count;
        struct uffdaemon_pages_storage *storage;
        int32_t fd;
        ...;
    };
    struct uffdaemon_pages *uffdaemon_pages_new(uint64_t count);
    struct uffdaemon_pages *uffdaemon_pages_map(int fd, uint64_t count, int *error);
    struct uffdaemon_pages *uffdaemon_pages_map_part(int fd, uint64_t offset, uint64_t count,
                                                     int *error);
    uint64_t uffdaemon_pages_size(uint64_t count);
    void uffdaemon_pages_copy_into(struct uffdaemon_pages *copy,
                                   const struct uffdaemon_pages *pages);
    struct uffdaemon_pages *uffdaemon_pages_copy(const struct uffdaemon_pages *pages);
    void uffdaemon_pages_put(struct uffdaemon_pages *pages);
    void uffdaemon_pages_close_file(struct uffdaemon_pages *pages);
    void uffdaemon_pages_fill(struct uffdaemon_pages *pages, uint64_t first, uint64_t end);
    void uffdaemon_pages_empty(struct uffdaemon_pages *pages, uint64_t first, uint64_t end);
    void uffdaemon_pages_discard(struct uffdaemon_pages *pages, uint64_t first, uint64_t end);
    void uffdaemon_pages_void(struct uffdaemon_pages *pages, uint64_t first, uint64_t end);
    struct uffdaemon_snapshot;
    struct uffdaemon_pages *uffdaemon_snapshot_take(struct uffdaemon_snapshot *snapshot,
                                                    struct uffdaemon_pages *original);
    void uffdaemon_snapshot_free(struct uffdaemon_snapshot *snapshot);
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
    depends=[str(path) for path in sorted(HERE.glob("*.h"))],
    extra_compile_args=[
        *("-std=gnu11", "-O2", "-pthread", "-Wall", "-Wextra", "-fvisibility=hidden"),
        "-Werror=implicit-function-declaration",  # as newer compilers have it
        "-fno-plt",  # a fault finds its pages cold: one less for each call into libc
        f"-iquote{HERE}",
    ],
    extra_link_args=["-Wl,-z,now", "-Wl,-Bsymbolic"],
    py_limited_api=not sysconfig.get_config_var("Py_GIL_DISABLED"),
)
