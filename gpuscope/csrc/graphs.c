/*
 * Stages inside CUDA graphs: exchanges the events of a graph's record nodes. The twin is `Driver.set_node_events`
 * of `_cuda/driver.py`.
 */
#include "native.h"

typedef int (*set_event_function)(void *graph, void *node, void *event);

/*
 * exchange(function, graph, nodes, events): have each node record into the event at its place. Returns the driver's
 * answer to the first that it refused, or to the last.
 *
 * Keeps the GIL, as `_cuda/driver.py` explains: some 0.2 µs per node.
 */
static PyObject *exchange(PyObject *Py_UNUSED(module), PyObject *args) {
    unsigned long long function, graph;
    Py_buffer nodes, events;
    if (!PyArg_ParseTuple(args, "KKy*y*:exchange", &function, &graph, &nodes, &events)) return NULL;
    PyObject *answer = NULL;
    if (function == 0 || nodes.len % sizeof(void *) || events.len < nodes.len) {
        PyErr_SetString(PyExc_ValueError, "exchange takes a function, a graph, and an event for each node");
    } else {
        void *const *node = nodes.buf, *const *event = events.buf;
        int code = 0;
        for (Py_ssize_t i = 0; code == 0 && i < nodes.len / (Py_ssize_t)sizeof(void *); i++)
            code = ((set_event_function)(uintptr_t)function)((void *)(uintptr_t)graph, node[i], event[i]);
        answer = PyLong_FromLong(code);
    }
    PyBuffer_Release(&nodes);
    PyBuffer_Release(&events);
    return answer;
}

static PyMethodDef functions[] = {
    {"exchange", exchange, METH_VARARGS, "Have the record nodes of a graph record into other events."},
    {NULL},
};

int add_graphs(PyObject *module) { return PyModule_AddFunctions(module, functions); }
