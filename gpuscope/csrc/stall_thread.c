/*
 * The thread of a `StallWatch`: its beginning and end, forks and exits. `_stalls/watch.py` owns it. It lives as that of a
 * `StreamSampler` does (`sampler_thread.c`): detached, without the GIL, and nobody waits for it for long.
 */
#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include "stall.h"

#ifdef __linux__
#include "sampler.h"

#include <signal.h>
#include <stdlib.h>
#include <time.h>

static const long long SHORTEST_NS = 10000000, LONGEST_NS = 250000000, EXIT_LIMIT_NS = 100000000;

pthread_mutex_t stall_lock = PTHREAD_MUTEX_INITIALIZER;
static pthread_cond_t changed;
static pthread_once_t once = PTHREAD_ONCE_INIT;
static StallWatch *all;
static atomic_flag is_writing = ATOMIC_FLAG_INIT; /* A report, by one watch. */

long long stall_now_ns(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return now.tv_sec * SECOND_NS + now.tv_nsec;
}

/* Waits, under the lock, for a change or the moment. */
static void wait_until(long long at_ns) {
    const struct timespec until = {at_ns / SECOND_NS, at_ns % SECOND_NS};
    pthread_cond_timedwait(&changed, &stall_lock, &until);
}

static void make_condition(void) {
    pthread_condattr_t monotonic;
    pthread_condattr_init(&monotonic);
    pthread_condattr_setclock(&monotonic, CLOCK_MONOTONIC);
    pthread_cond_init(&changed, &monotonic);
    pthread_condattr_destroy(&monotonic);
}

static void before_fork(void) { pthread_mutex_lock(&stall_lock); }
static void after_fork(void) { pthread_mutex_unlock(&stall_lock); }

static void after_fork_in_child(void) {
    for (StallWatch *each = all; each != NULL; each = each->next) {
        each->refs -= each->is_running;
        each->is_running = each->is_stopping = 0;
        if (each->ring != NULL) each->ring->stall = NULL;
        each->ring = NULL; /* The ring is the parent's. */
        each->count = each->found_count = 0;
    }
    atomic_flag_clear(&is_writing);
    stall_streams = NULL; /* Not freed: a record of the parent's may be in use. */
    stall_slots = 0;
    make_condition();
    pthread_mutex_unlock(&stall_lock);
}

static void at_exit(void) {
    pthread_mutex_lock(&stall_lock);
    for (StallWatch *each = all; each != NULL; each = each->next) each->is_stopping = 1;
    pthread_cond_broadcast(&changed);
    long long until_ns = stall_now_ns() + EXIT_LIMIT_NS;
    for (StallWatch *each = all; each != NULL && stall_now_ns() < until_ns;) {
        if (each->is_running) {
            wait_until(until_ns);
            each = all;
        } else {
            each = each->next;
        }
    }
    pthread_mutex_unlock(&stall_lock);
}

static void set_up(void) {
    make_condition();
    pthread_atfork(before_fork, after_fork, after_fork_in_child);
    atexit(at_exit);
}

/* Under the lock. */
static void let_go(StallWatch *self) {
    if (--self->refs) return;
    for (StallWatch **place = &all; *place != NULL; place = &(*place)->next)
        if (*place == self) {
            *place = self->next;
            break;
        }
    free(self->open);
    free(self->path);
    free(self);
}

static int copy_lines(const StallWatch *self, Line *lines, long long now_ns) {
    int count = 0;
    for (int i = 0; self->ring != NULL && i < self->count && count < MOST_LINES; i++) {
        const Open *open = &self->open[i];
        if (open->is_ended) continue;
        copy_text(site_at(self->ring, open->site), lines[count].site_name, SITE_TEXT);
        copy_text(thread_at(self->ring, open->thread), lines[count].thread_name, THREAD_TEXT);
        lines[count++].age_ns = now_ns - open->start_ns;
    }
    return count;
}

/* What was found long ago, and no thread of Python has come for: nothing else would say it. Lets go of the lock meanwhile. */
static void write_what_waits(StallWatch *self) {
    static Report report;
    if (atomic_flag_test_and_set(&is_writing)) return;
    pthread_mutex_unlock(&stall_lock);
    read_streams();
    pthread_mutex_lock(&stall_lock);
    report.now_ns = stall_now_ns();
    report.kept_ns = report.now_ns - self->found_ns;
    report.count = 0;
    for (int i = 0; i < self->found_count; i++) {
        Found *each = &self->found[i];
        if (each->kind != STALL_BEGINS || each->written) continue;
        each->written = (Number)kind_of_stall(each, report.now_ns);
        report.found[report.count++] = *each;
    }
    report.line_count = copy_lines(self, report.lines, report.now_ns);
    if (report.count) {
        pthread_mutex_unlock(&stall_lock);
        note_stack_soon();
        int failed = write_report(self->path, &report);
        pthread_mutex_lock(&stall_lock);
        self->unwritten += failed ? report.count : 0;
    }
    atomic_flag_clear(&is_writing);
}

/* One look, under the lock. */
static void look(StallWatch *self) {
    long long now_ns = stall_now_ns();
    if (self->ring == NULL) return;
    /* While a graph is captured nothing can be asked, and much is slow for once. */
    if (self->is_excused || atomic_load(&sampler_holds)) excuse_all(self, now_ns);
    scan_ring(self, now_ns);
    if (!self->found_count) return;
    pthread_cond_broadcast(&changed);
    if (now_ns - self->found_ns >= self->kept_ns) write_what_waits(self);
}

static void *run(void *argument) {
    StallWatch *self = argument;
    pthread_setname_np(pthread_self(), "gpuscope-stall");
    pthread_mutex_lock(&stall_lock);
    long long next_ns = stall_now_ns();
    while (!self->is_stopping) {
        if (stall_now_ns() < next_ns) {
            wait_until(next_ns);
        } else {
            look(self);
            long long pause_ns = self->least_ns / 8;
            pause_ns = pause_ns > LONGEST_NS ? LONGEST_NS : pause_ns < SHORTEST_NS ? SHORTEST_NS : pause_ns;
            next_ns = stall_now_ns() + pause_ns;
        }
    }
    self->is_running = 0;
    pthread_cond_broadcast(&changed);
    let_go(self);
    pthread_mutex_unlock(&stall_lock);
    return NULL;
}

/* ---- any thread */

StallWatch *new_stall_watch(long long limit_ns, unsigned warmup, long long kept_ns, const char *path) {
    StallWatch *self = calloc(1, sizeof *self);
    Open *open = calloc(MOST_OPEN, sizeof *open);
    char *own = strdup(path);
    if (self == NULL || open == NULL || own == NULL) {
        free(self);
        free(open);
        free(own);
        return NULL;
    }
    pthread_once(&once, set_up);
    self->refs = 1;
    self->limit_ns = limit_ns;
    self->least_ns = limit_ns > 0 ? limit_ns : SECOND_NS;
    self->warmup = warmup;
    self->kept_ns = kept_ns;
    self->open = open;
    self->path = own;
    memset(self->warmups, 0xFF, sizeof self->warmups);
    pthread_mutex_lock(&stall_lock);
    self->next = all;
    all = self;
    pthread_mutex_unlock(&stall_lock);
    return self;
}

int start_stall_watch(StallWatch *self) {
    pthread_t thread;
    pthread_attr_t detached;
    sigset_t every, before;
    int failed = 0;
    pthread_mutex_lock(&stall_lock);
    self->is_stopping = 0; /* A thread that has not noticed goes on. */
    if (!self->is_running) {
        self->last_ns = 0;
        pthread_attr_init(&detached);
        pthread_attr_setdetachstate(&detached, PTHREAD_CREATE_DETACHED);
        sigfillset(&every);
        pthread_sigmask(SIG_SETMASK, &every, &before); /* Signals are for the program's threads. */
        failed = pthread_create(&thread, &detached, run, self);
        pthread_sigmask(SIG_SETMASK, &before, NULL);
        pthread_attr_destroy(&detached);
        self->is_running = !failed;
        self->refs += !failed;
    }
    pthread_mutex_unlock(&stall_lock);
    return failed ? -1 : 0;
}

int stop_stall_watch(StallWatch *self, long long limit_ns) {
    pthread_mutex_lock(&stall_lock);
    self->is_stopping = 1;
    pthread_cond_broadcast(&changed);
    long long until_ns = stall_now_ns() + limit_ns;
    while (self->is_running && self->is_stopping && stall_now_ns() < until_ns) wait_until(until_ns);
    int failed = self->is_running;
    pthread_mutex_unlock(&stall_lock);
    return failed ? -1 : 0;
}

void drop_stall_watch(StallWatch *self) {
    pthread_mutex_lock(&stall_lock);
    self->is_stopping = 1;
    pthread_cond_broadcast(&changed);
    let_go(self);
    pthread_mutex_unlock(&stall_lock);
}

void wait_for_found(StallWatch *self, long long until_ns) {
    pthread_mutex_lock(&stall_lock);
    while (!self->found_count && !self->is_stopping && stall_now_ns() < until_ns) wait_until(until_ns);
    pthread_mutex_unlock(&stall_lock);
}
#endif
