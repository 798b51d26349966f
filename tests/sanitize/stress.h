/* What the threads of the stress test share: memory that is guarded, and the books that Python would
 * keep of it. */
#ifndef STRESS_H
#define STRESS_H

#define _GNU_SOURCE
#include <pthread.h>
#include <stdint.h>

#include "native.h"

/* PAGE, the size of a page in bytes, comes from the command line. */
#define PAGES 128u
#define LENGTH (PAGES * PAGE)

/* By what happens to them.  All are unmapped and mapped anew now and then. */
#define FIXED 0   /* nothing, but that rules for them come and go */
#define CHURNED 1 /* pages are discarded */
#define REFUSED 2 /* the same, and every second eight pages cannot be brought */
#define MOVING 3  /* discarded, and moved by mremap(2) */
#define REGIONS 4

/* What the thread that owns a page has done to it.  Zeros are due for ever after. */
#define INTACT 0
#define DISCARDING 1
#define DISCARDED 2

struct region {
    unsigned number;
    pthread_rwlock_t lock; /* of `start`, held while it is touched */
    uint64_t start;
    unsigned char *source;         /* what its pages are to hold */
    uint64_t at[PAGES];            /* books: where each page is, 0: nowhere */
    unsigned char zeros[PAGES];    /* books: whether zeros are due there */
    uint32_t state[PAGES];         /* atomic; of the three above */
    struct uffdaemon_pages *pages; /* what C knows of them */
};

struct service {
    int fd, notify, in_thread;
    struct uffdaemon_port *port;
    struct region regions[REGIONS];
    pthread_mutex_t books; /* of `at` and `zeros`, and all of the following */
    uint64_t events;       /* those that the books know of */
    uint64_t variant;      /* of the rules that were published last */
    uint64_t *pending;     /* addresses of faults that are to be answered */
    size_t pending_count;
};

extern unsigned char nothing[PAGE]; /* zeros */
extern unsigned char *forbidden;    /* nobody may read there */

/* stress.c */
void fail(const char *what, uint64_t first, uint64_t second) __attribute__((noreturn));
void check(int holds, const char *what, uint64_t first, uint64_t second);
int stopped(void);
uint64_t next_random(uint64_t *seed);
void pause_us(unsigned microseconds);
int touch(uint64_t address, int write, uint64_t *word);
int look(const struct region *region, unsigned page, uint64_t address, int write);
uint64_t word_of(unsigned region, unsigned page);
void map(uint64_t start, uint64_t length, int protection);
int open_userfaultfd(int in_thread);

/* books.c */
void service_open(struct service *service, int in_thread);
void service_close(struct service *service);
int catch_up(struct service *service);
int publish(struct service *service);
void publish_at_once(struct service *service);
void answer_pending(struct service *service);
void execute_one(struct service *service, uint64_t *seed);

/* churn.c */
void *churn(void *service);
void *come_and_go(void *resolver_and_more);

struct guest {
    struct uffdaemon_resolver *resolver;
    int in_thread;
};
#endif
