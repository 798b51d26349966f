/*
 * The client's memory: mapped, warmed, registered and handed to the handler.
 */
#ifndef BENCH_CLIENT_H
#define BENCH_CLIENT_H

#include "touching.h"

#include <time.h>

#define MAX_TEXT 65536UL

/* Maps the regions and has the host find their memory. `bases` has room for options->regions,
 * `text` for MAX_TEXT bytes of JSON, which say where they are. */
void prepare(const struct options *options, char **bases, char *text);

/* Maps options->image as the regions instead, for reading, here and there. */
void map_file(const struct options *options, char **bases);

/* A userfaultfd with so many features, with which the regions are registered. */
int open_registered(const struct options *options, char **bases, uint64_t features);

/* Registers the regions and hands them over; returns the handler's processor clock once it says
 * "go". The descriptor stays open until this process ends. */
clockid_t hand_over(const struct options *options, char **bases, const char *text);

#endif
