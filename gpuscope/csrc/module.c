/* The module `gpuscope._native`: `_data/native.py` decides whether it or the twins are used. */
#include "native.h"

int add_type(PyObject *module, PyType_Spec *spec, PyTypeObject **type) {
    PyTypeObject *made = (PyTypeObject *)PyType_FromModuleAndSpec(module, spec, NULL);
    if (made == NULL) return -1;
    int failed = PyModule_AddType(module, made);
    if (type != NULL) *type = made;
    else Py_DECREF(made);
    return failed ? -1 : 0;
}

/* Types, and what `prepare` gave, are there once per process. Of gpuscope imported anew (a purged `sys.modules`, a
   sub-interpreter) they would be taken from under the stages that run, so that one gets along with the twins. */
static int is_taken;

static int execute(PyObject *module) {
    if (is_taken) {
        PyErr_SetString(PyExc_ImportError, "gpuscope._native serves an earlier import of gpuscope in this process");
        return -1;
    }
    is_taken = 1;
    if (add_record(module) || add_recording(module) || add_block(module) || add_calls(module)) return -1;
    if (add_pairs(module) || add_events(module) || add_place(module) || add_pack(module) || add_join(module)) return -1;
    if (add_reader(module) || add_graphs(module) || add_sampler(module) || add_token(module) || add_summed(module)) return -1;
    return add_requests(module) || add_flight(module) || add_stall(module) ? -1 : 0;
}

static PyModuleDef_Slot slots[] = {
    {Py_mod_exec, execute},
#if PY_VERSION_HEX >= 0x030C0000
    {Py_mod_multiple_interpreters, Py_MOD_MULTIPLE_INTERPRETERS_NOT_SUPPORTED},
#endif
    {0, NULL},
};

static struct PyModuleDef definition = {
    PyModuleDef_HEAD_INIT,
    .m_name = "gpuscope._native",
    .m_doc = "The hot code in C: optional, and the same in every way but its cost.",
    .m_slots = slots,
};

PyMODINIT_FUNC PyInit__native(void) { return PyModuleDef_Init(&definition); }
