/* Threads that use the bouncing pages through both addresses, and know what must be there. */
#include "soak.h"

/* What every other writer has published must be visible, through whichever address. */
static void look(struct soak *soak, struct writer *me, uint64_t *seed)
{
    for (unsigned other = 0; other < WRITERS; other++) {
        uint64_t due = __atomic_load_n(&soak->writers[other].published, __ATOMIC_ACQUIRE);
        uint64_t *word = word_of(soak, (unsigned)next_random(seed), HOT, 64 * other);

        if (__atomic_load_n(word, __ATOMIC_SEQ_CST) < due)
            __atomic_fetch_add(&me->stale, 1, __ATOMIC_RELAXED);
        me->reads++;
    }
}

/* Adds 1 to its own word, which nobody else does: what comes back is what must have been there. */
void soak_write(struct soak *soak, unsigned number)
{
    struct writer *me = &soak->writers[number];
    uint64_t seed = number + 1;

    while (!stopped(soak)) {
        uint64_t *word = word_of(soak, (unsigned)next_random(&seed), HOT, 64 * number);

        for (uint64_t burst = 1 + next_random(&seed) % 32; burst; burst--) {
            uint64_t before = __atomic_fetch_add(word, 1, __ATOMIC_SEQ_CST);

            if (before != me->count)
                me->lost += before < me->count ? me->count - before : 1;
            me->count = before + 1;
            __atomic_store_n(&me->published, me->count, __ATOMIC_RELEASE);
        }
        look(soak, me, &seed);
    }
}

/* Reads what must never change, through both addresses. */
void soak_check(struct soak *soak)
{
    static const unsigned constant[] = {COLD, COLD + 1, RING};
    uint64_t seed = 77;

    while (!stopped(soak)) {
        unsigned page = constant[next_random(&seed) % 3];
        unsigned byte = (unsigned)(next_random(&seed) % (PAGE / 8)) * 8;
        uint64_t *word = word_of(soak, (unsigned)next_random(&seed), page, byte);

        if (__atomic_load_n(word, __ATOMIC_RELAXED) != PATTERN + (page == RING))
            __atomic_fetch_add(&soak->wrong, 1, __ATOMIC_RELAXED);
        soak->checks++;
    }
}
