/*
 * Events that neighbouring stages share; the twin, `begin` and `end` in `_cuda/cuda_device.py`, shares none. The end of a
 * stage is the start of the next, outer and inner start together, inner and outer end together. Each event costs the host
 * some 1.4 us and the GPU about one (H100), and a chain of n stages has n + 1 instead of 2n.
 *
 * That is right as long as nothing was enqueued on the stream since the event. It is known by time: the least that a
 * thread can enqueue takes longer than a window (`window_ns` of `events.c`), so where less time has passed in which the
 * thread was not in `begin` or `end`, there is nothing between. The tests on a GPU measure both. Another thread may
 * enqueue at any time, and so nothing is shared on a stream on which a second one has had stages within the last second;
 * nor on a stream of another library, nor where recording has to be preceded by a question. A thread that enqueues on the
 * stream, at the same moment, without any stage of its own, is not seen: its work may count to the stage that follows, as
 * it counts to one that runs.
 */
#include "native.h"

#ifdef __linux__
#include <time.h>
#endif

static const long long QUIET_NS = 1000000000;

/* An event is shared for so many times the window: a stage deep inside others is not to begin before it is entered. */
enum { OLDEST = 10 };

/* 0 where that is not the clock of stages; then nothing is shared. */
static inline long long sharing_now_ns(void) {
#ifdef __linux__
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return now.tv_sec * 1000000000LL + now.tv_nsec;
#else
    return 0;
#endif
}

/* The first thing in `begin` and `end`. */
static inline void note_call(StageRecord *record) {
    record->called_ns = sharing_now_ns();
    record->is_timed = 0;
}

/* The last thing in them. What was passed in them is not time in which the thread could enqueue anything. */
static inline void note_return(StageRecord *record, PyObject *stream) {
    if (record->is_timed && stream != NULL && PyObject_TypeCheck(stream, timed_stream_type))
        ((TimedStream *)stream)->left_ns = sharing_now_ns();
    record->is_timed = 0;
}
