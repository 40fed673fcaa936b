/*
 * What the files of `StallWatch` share: the class is in `stall.c`, its thread in `stall_thread.c`, how it finds stages that
 * make no progress in `stall_scan.c`, the file that it writes in `stall_report.c`. `_stalls/watch.py` owns it.
 *
 * The thread reads the flight recorder's ring, and never takes the GIL. One mutex is for all that threads share; nobody holds
 * it while waiting for the GIL, for the driver or for a disk, or while holding the sampler's.
 */
#ifndef GPUSCOPE_STALL_H
#define GPUSCOPE_STALL_H

#include "flight.h"

#include <pthread.h>

enum { MOST_OPEN = 4096, OPEN_BUCKETS = 8192, MOST_FOUND = 32, SITE_TEXT = 128, THREAD_TEXT = 64, MOST_STATES = 256, MOST_LINES = 64 };
enum { STALL_BEGINS, STALL_ENDS };
/* Of `written`: not, or as which kind. The kinds are those of `_stalls/found.py`. */
enum { NOT_WRITTEN, HOST_NEVER_LEFT, HOST_NOT_BACK };

/* A stage that runs. */
typedef struct {
    Number high, low, id, parent, thread;
    unsigned site;
    size_t slot;
    /* When it began, and when it or a stage inside it last began or ended. */
    long long start_ns, active_ns;
    char is_ended, is_gone, is_warm, is_excused, is_said, is_over, is_late_inside;
} Open;

/* A stage that makes no progress, or does again. The twin is `FOUND` of `_stalls/watch.py`. */
typedef struct {
    Number kind, high, low, id, thread, site, watch;
    long long start_ns, active_ns, limit_ns, now_ns, written;
    char site_name[SITE_TEXT], thread_name[THREAD_TEXT];
} Found;

typedef struct StallWatch {
    int refs; /* Of the object, and of the thread. */
    int is_running, is_stopping;
    FlightRing *ring; /* Not held: the ring leaves it before it goes. */
    Number read; /* So many slots of the ring have been read since it was made. */
    long long last_ns, kept_ns, limit_ns, least_ns;
    unsigned warmup;
    int is_excused; /* What is known of compilations: nothing is said then. */
    Open *open;
    int count;
    unsigned short buckets[OPEN_BUCKETS];
    long long limits[MAX_SITES]; /* Of each stage's name; 0 for the general one, below for none. */
    unsigned begun[MAX_SITES];
    int warmups[MAX_SITES]; /* -1 where nothing was said of it here. */
    Found found[MOST_FOUND];
    int found_count;
    long long found_ns; /* When the first of them was found. */
    long long stalls, unwritten;
    char *path;
    struct StallWatch *next;
} StallWatch;

extern pthread_mutex_t stall_lock;

long long stall_now_ns(void);

/* Looks at what has begun and ended since the last time, and notes what is found. Under the lock. */
void scan_ring(StallWatch *self, long long now_ns);
/* Counts all that runs as having made progress now. Under the lock. */
void excuse_all(StallWatch *self, long long now_ns);
/* The text of the ring's table of sites or threads. Under the lock. */
void copy_text(const char *at, char *to, size_t room);
const char *thread_at(const FlightRing *ring, Number ident);
const char *site_at(const FlightRing *ring, unsigned site);

typedef struct {
    char site_name[SITE_TEXT], thread_name[THREAD_TEXT];
    long long age_ns;
} Line;

/* What the thread writes to its file: what is found, and all that runs. One at a time is being written. */
typedef struct {
    Found found[MOST_FOUND];
    Line lines[MOST_LINES];
    int count, line_count;
    long long now_ns, kept_ns;
} Report;

/* Asks what streams answered last: not under the lock. */
void read_streams(void);
/* Which kind of stall it is, by that. */
int kind_of_stall(const Found *found, long long now_ns);
/* Appends a report to the file; -1 where that cannot be. */
int write_report(const char *path, const Report *report);

/* Null where there is no memory. */
StallWatch *new_stall_watch(long long limit_ns, unsigned warmup, long long kept_ns, const char *path);
int start_stall_watch(StallWatch *self);
int stop_stall_watch(StallWatch *self, long long limit_ns);
void drop_stall_watch(StallWatch *self);
void follow_ring(StallWatch *self, FlightRing *ring);
/* Waits for something found, or until it is stopped. */
void wait_for_found(StallWatch *self, long long until_ns);

/* Has the main thread note its stack before it lets go of the GIL: needs no GIL, and no thread state. */
void note_stack_soon(void);

#endif
