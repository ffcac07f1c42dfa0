/* The native engine: the mean of one block of elements in one call, without the interpreter lock.
 *
 * For each element it widens the inputs to float64, adds them in checkpoint order, divides once by their number, and
 * rounds once to the output's dtype. The torch engine (arithmetic.py) gives the same bytes. All is compiled
 * without contraction to FMA and without fast-math: a compiler that keeps the order of IEEE 754 operations cannot change
 * a bit of the result, and the vector instructions that `target_clones` selects at run time cannot either.
 *
 * Nothing is allocated: the caller passes a table with a row for each input, and memory for the inputs that are not
 * mapped. What Python passes is checked before the lock is released.
 *
 * kernel_formats.h has the dtypes, sums and rounding, kernel_exact.h what float64 inputs need besides, kernel_copy.h the
 * copies of tensors whose elements are not consecutive.
 */
#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <errno.h>
#include <fenv.h>
#include <signal.h>
#include <stdint.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include "kernel_formats.h"

#include "kernel_exact.h"

/* In the thread-local block of the program itself, so that a signal handler can use it: a library's own block may be
 * allocated at its first use. musl has no room there for libraries that are loaded later. */
#ifdef __GLIBC__
#define THREAD_LOCAL static __thread __attribute__((tls_model("initial-exec")))
#else
#define THREAD_LOCAL static __thread
#endif

/* ---- the inputs of one call -------------------------------------------------------------------------------------- */

enum { MEMORY, MAP, READ }; /* where an input is: in a slot of the caller's memory, or in a file to map, or to read */

/* A row of the caller's table. */
struct input {
    int64_t where, descriptor, offset, dtype, position; /* position: of its slot, if it is not mapped */
    int64_t address;           /* of the window's first element; set here, like what follows */
    int64_t mapping, nmapping; /* the mapped pages of the window; none if nmapping is 0 */
};

enum { CHECK_FINITE = 1, CHECK_RANGE = 2 };
enum { DONE, NOT_FINITE, OUT_OF_RANGE, NOT_MAPPED, NOT_READ, LOST };

struct job {
    struct input *inputs;
    const f64 *weights; /* one for each input; NULL if all count the same */
    int64_t number, elements, slot;
    char *memory, *output;
    int64_t only;    /* the dtype of all inputs, or -1 */
    int has_float64; /* whether one of them is */
    int dtype, check; /* check: CHECK_FINITE, CHECK_RANGE or both; NaN and Inf are accepted otherwise */
    int what; /* the result: one of the above, */
    int64_t index, code; /* the element or the input, and errno, */
    double value; /* and the mean that is out of range */
    volatile int64_t lost; /* the number of an input, counted from 1, of which a mapped page is gone */
};

/* ---- mapped pages that are gone ---------------------------------------------------------------------------------- */

/* If a file is truncated, or its disk fails, reading a mapped page raises SIGBUS, in the thread that reads. The handler
 * maps zeros in place of the window's pages, so that the read succeeds, and notes the input; the call then returns LOST.
 * That needs no jump out of the arithmetic, and mmap is one system call. Any other fault goes to the handler that was
 * there before. */
THREAD_LOCAL struct job *current; /* what this thread computes */
THREAD_LOCAL int passing_on;      /* whether a fault is with the handler that was there before */
static struct sigaction before;

static void pass_on(int number, siginfo_t *information, void *context)
{
    if (!passing_on && (before.sa_flags & SA_SIGINFO) && before.sa_sigaction != NULL) {
        passing_on = 1;
        before.sa_sigaction(number, information, context);
        passing_on = 0;
    } else if (!passing_on && before.sa_handler != SIG_DFL && before.sa_handler != SIG_IGN) {
        passing_on = 1;
        before.sa_handler(number);
        passing_on = 0;
    } else {
        signal(number, SIG_DFL); /* the same read faults again, and ends the process */
        if (information->si_code <= 0)
            raise(number); /* no read: another process sent it */
    }
}

static void on_fault(int number, siginfo_t *information, void *context)
{
    struct job *job = current;
    uintptr_t address = (uintptr_t)information->si_addr;
    for (int64_t i = 0; job != NULL && i < job->number; i++) {
        const struct input *input = &job->inputs[i];
        uintptr_t begin = (uintptr_t)input->mapping;
        if (input->where == MAP && address - begin < (uintptr_t)input->nmapping) {
            int saved = errno;
            void *zeros = mmap((void *)begin, (size_t)input->nmapping, PROT_READ,
                               MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0);
            errno = saved;
            if (zeros != MAP_FAILED) {
                job->lost = i + 1;
                return;
            }
        }
    }
    pass_on(number, information, context);
}

/* Installs the handler, again if another has taken its place. The interpreter lock is held. */
static int watch_faults(void)
{
    struct sigaction now, ours;
    if (sigaction(SIGBUS, NULL, &now) != 0)
        return -1;
    if ((now.sa_flags & SA_SIGINFO) && now.sa_sigaction == on_fault)
        return 0;
    before = now;
    memset(&ours, 0, sizeof ours);
    ours.sa_sigaction = on_fault;
    ours.sa_flags = SA_SIGINFO | SA_NODEFER | SA_ONSTACK | SA_RESTART;
    sigemptyset(&ours.sa_mask);
    return sigaction(SIGBUS, &ours, NULL);
}

/* ---- windows ----------------------------------------------------------------------------------------------------- */

static int fail(struct job *job, int what, int64_t index, int64_t code)
{
    job->what = what, job->index = index, job->code = code;
    return -1;
}

static void close_windows(struct job *job)
{
    for (int64_t i = 0; i < job->number; i++) {
        struct input *input = &job->inputs[i];
        if (input->nmapping)
            munmap((void *)(intptr_t)input->mapping, (size_t)input->nmapping);
        input->nmapping = 0;
    }
}

static int read_window(struct job *job, int64_t i, int64_t offset, int64_t length)
{
    struct input *input = &job->inputs[i];
    char *slot = job->memory + input->position;
    input->address = (intptr_t)slot;
    for (int64_t done = 0; done < length;) {
        ssize_t count = pread((int)input->descriptor, slot + done, (size_t)(length - done), offset + done);
        if (count < 0 && errno == EINTR)
            continue;
        if (count <= 0)
            return fail(job, count < 0 ? NOT_READ : LOST, i, count < 0 ? errno : 0);
        done += count;
    }
    return 0;
}

static int map_window(struct job *job, int64_t i, int64_t offset, int64_t length)
{
    struct input *input = &job->inputs[i];
    int64_t extra = offset % sysconf(_SC_PAGESIZE);
    void *mapping =
        mmap(NULL, (size_t)(extra + length), PROT_READ, MAP_SHARED, (int)input->descriptor, offset - extra);
    if (mapping == MAP_FAILED)
        return fail(job, NOT_MAPPED, i, errno);
    input->mapping = (intptr_t)mapping;
    input->nmapping = extra + length;
    input->address = input->mapping + extra;
    return 0;
}

/* Makes elements [first, first + n) of every input readable at `address`. */
static int open_windows(struct job *job, int64_t first, int64_t n)
{
    for (int64_t i = 0; i < job->number; i++) {
        struct input *input = &job->inputs[i];
        int64_t size = sizes[input->dtype];
        if (input->where == MEMORY)
            input->address = (intptr_t)(job->memory + input->position + first * size);
        else if ((input->where == MAP ? map_window : read_window)(job, i, input->offset + first * size, n * size) != 0)
            return -1;
    }
    return 0;
}

/* ---- the mean of one window -------------------------------------------------------------------------------------- */

static const char *stored(const struct input *input, size_t first)
{
    return (const char *)(intptr_t)input->address + first * (size_t)sizes[input->dtype];
}

/* Where the values of one input are as float32: in place, or in `buffer`. */
static const void *values_of(const struct input *input, size_t first, size_t n, float *buffer)
{
    if (input->dtype == F32)
        return stored(input, first);
    widen[input->dtype](buffer, stored(input, first), 1, n);
    return buffer;
}

/* Sums inputs of a format with a 4-bit exponent. Their values are multiples of 2^-9 below 2^9, or of 2^-10 below 2^8: sums
 * of up to 64 are exact in float32, and all sums in float64, so that the order does not matter. */
static void sum_E4M3(const struct job *job, size_t first, size_t n, double *sum)
{
    float part[BLOCK];
    for (int64_t k = 0; k < job->number; k++) {
        const char *codes = stored(&job->inputs[k], first);
        for (size_t i = 0; i < n; i += 64) /* the next ones: a processor cannot foresee them from so few bytes */
            __builtin_prefetch((const void *)((uintptr_t)codes + n + i));
        widen[job->only](part, codes, k % 64 == 0, n);
        if (k % 64 == 63 || k + 1 == job->number)
            add(sum, part, k < 64, n);
    }
}

/* Sums inputs of which none is float64, or in pairs inputs that are all bfloat16. */
static void sum_narrower(const struct job *job, size_t first, size_t n, int in_pairs, double *sum)
{
    float buffers[4][BLOCK];
    const void *values[4];
    for (int64_t k = 0, number; k < job->number; k += number) {
        number = k + 4 <= job->number ? 4 : 1;
        for (int i = 0; i < number; i++) {
            const struct input *input = &job->inputs[k + i];
            values[i] = in_pairs ? stored(input, first) : values_of(input, first, n, buffers[i]);
        }
        if (number == 4)
            (in_pairs ? add_four_pairs : add_four)(sum, values, k == 0, n);
        else
            (in_pairs ? add_pairs : add)(sum, values[0], k == 0, n);
    }
}

/* Widens one input to float64. */
static void load(const struct input *input, size_t first, size_t n, double *wide)
{
    float buffer[BLOCK];
    if (input->dtype == F64)
        memcpy(wide, stored(input, first), n * sizeof *wide);
    else
        add(wide, values_of(input, first, n, buffer), 1, n);
}

/* The sums of inputs times their weights, of any dtypes. With u = 2^-53, the error of a sum of n products is at most
 * n u / (1 - n u) * sum(|weight * input|), unless a product is subnormal (Higham, Accuracy and Stability of Numerical
 * Algorithms, section 3.1). */
static void sum_weighted(const struct job *job, size_t first, size_t n, double *sum)
{
    double input[BLOCK];
    for (int64_t k = 0; k < job->number; k++) {
        load(&job->inputs[k], first, n, input);
        add_product(sum, input, job->weights[k], k == 0, n);
    }
}

/* Where a weighted sum is not finite, but all inputs are equal, the mean is that value: -Inf in a mask, times weights of
 * both signs, would be NaN. */
static double equal_or(const struct job *job, size_t element, double mean)
{
    double start, other;
    load(&job->inputs[0], element, 1, &start);
    for (int64_t k = 1; k < job->number; k++) {
        load(&job->inputs[k], element, 1, &other);
        if (bits_of(other) != bits_of(start))
            return mean;
    }
    return start;
}

/* The exact mean of one element. */
static double exact_mean(const struct job *job, size_t element, int to_odd)
{
    struct integer positive = {{0}}, negative = {{0}};
    double sum = -0.0;
    int is_finite = 1;
    for (int64_t k = 0; k < job->number; k++) {
        double value;
        load(&job->inputs[k], element, 1, &value);
        sum += value;
        is_finite &= (bits_of(value) & MAGNITUDE) < INFINITE;
        if (is_finite)
            add_magnitude(bits_of(value) < 0 ? &negative : &positive, value);
    }
    if (!is_finite)
        return sum / (double)job->number;
    int is_negative = is_smaller(&positive, &negative);
    struct integer *larger = is_negative ? &negative : &positive;
    subtract(larger, is_negative ? &positive : &negative);
    double mean = quotient_of(larger, (uint32_t)job->number, to_odd);
    return is_negative ? -mean : mean;
}

/* The means of float64 inputs; elements that are equal in all are copied. */
static void mean_of_float64(const struct job *job, size_t first, size_t n, double *mean)
{
    double start[EXACT_BLOCK], input[EXACT_BLOCK], low[EXACT_BLOCK], lost[EXACT_BLOCK];
    int64_t different[EXACT_BLOCK], unsure[EXACT_BLOCK];
    int to_odd = job->dtype != F64;
    load(&job->inputs[0], first, n, start);
    memcpy(mean, start, n * sizeof *mean);
    memset(low, 0, n * sizeof *low);
    memset(lost, 0, n * sizeof *lost);
    memset(different, 0, n * sizeof *different);
    for (int64_t k = 1; k < job->number; k++) {
        load(&job->inputs[k], first, n, input);
        add_exactly(mean, low, lost, different, start, input, n);
    }
    divide_exactly(mean, low, lost, unsure, (double)job->number, to_odd, n);
    for (size_t i = 0; i < n; i++) {
        if (different[i] == 0)
            mean[i] = start[i];
        else if (unsure[i])
            mean[i] = exact_mean(job, first + i, to_odd);
    }
}

/* Computes n <= BLOCK means and writes them at `output`. Returns whether any is NaN or infinite there; `mean` then contains
 * them, in pairs if the inputs are summed so. */
static int write_means(const struct job *job, size_t first, size_t n, int in_pairs, double *mean, char *output)
{
    double number = (double)job->number, factor = 1;
    if (job->weights != NULL) {
        sum_weighted(job, first, n, mean);
    } else if (job->has_float64) {
        for (size_t i = 0; i < n; i += EXACT_BLOCK)
            mean_of_float64(job, first + i, n - i < EXACT_BLOCK ? n - i : EXACT_BLOCK, mean + i);
    } else {
        if (job->only == E4M3 || job->only == E4M3_FNUZ)
            sum_E4M3(job, first, n, mean);
        else
            sum_narrower(job, first, n, in_pairs, mean);
        /* To multiply by the reciprocal of a power of two rounds the same number, in a fraction of the time. */
        if ((bits_of(number) & FRACTION) == 0)
            factor = 1 / number;
        else
            divide(mean, number, n);
    }
    if (!(in_pairs ? round_pairs : round_to[job->dtype])(mean, factor, output, n))
        return 0;
    for (size_t i = 0; i < n; i++)
        mean[i] *= factor;
    return 1;
}

/* Looks through means of which some are NaN or infinite in the output: writes the code of NaN; ends the call with the first
 * mean that is not finite, or else out of range. */
static void look_through(struct job *job, double *mean, size_t first, size_t n, int64_t begin, char *output)
{
    int64_t size = sizes[job->dtype], not_finite = -1, out_of_range = -1, found = -1;
    for (size_t i = n; i-- > 0;) {
        if ((bits_of(mean[i]) & MAGNITUDE) >= INFINITE && job->weights != NULL)
            mean[i] = equal_or(job, first + i, mean[i]);
        int is_out = round_to[job->dtype](&mean[i], 1, output + (int64_t)i * size, 1);
        if ((bits_of(mean[i]) & MAGNITUDE) >= INFINITE)
            not_finite = (int64_t)i;
        else if (is_out)
            out_of_range = (int64_t)i;
    }
    if (not_finite >= 0)
        write_nans(mean, output, n, job->dtype);
    if (not_finite >= 0 && (job->check & CHECK_FINITE))
        job->what = NOT_FINITE, found = not_finite;
    else if (out_of_range >= 0 && (job->check & CHECK_RANGE))
        job->what = OUT_OF_RANGE, found = out_of_range;
    if (found >= 0)
        job->index = begin + (int64_t)first + found, job->value = mean[found];
}

/* Computes the elements of the open windows, which are [begin, begin + n) of the call. */
static void mean_of_windows(struct job *job, int64_t begin, int64_t n)
{
    double mean[BLOCK];
    for (size_t first = 0, count; first < (size_t)n && job->what == DONE; first += count) {
        count = (size_t)n - first < BLOCK ? (size_t)n - first : BLOCK;
        char *output = job->output + (begin + (int64_t)first) * sizes[job->dtype];
        int in_pairs = job->only == BF16 && job->dtype == BF16 && count % 2 == 0 && job->weights == NULL;
        int found = write_means(job, first, count, in_pairs, mean, output);
        if (found && in_pairs)
            found = write_means(job, first, count, 0, mean, output);
        if (found)
            look_through(job, mean, first, count, begin, output);
    }
}

static void compute(struct job *job)
{
    fenv_t kept; /* threads inherit it: a program may flush subnormal numbers to zero, as torch.set_flush_denormal does */
    fegetenv(&kept);
    fesetenv(FE_DFL_ENV);
    int64_t window = job->elements, size = 1;
    job->only = job->inputs[0].dtype;
    for (int64_t i = 0; i < job->number; i++) {
        int64_t dtype = job->inputs[i].dtype;
        size = sizes[dtype] > size ? sizes[dtype] : size;
        job->has_float64 |= dtype == F64;
        job->only = dtype == job->only ? dtype : -1;
    }
    if (window > job->slot / size)
        window = job->slot / size;
    current = job;
    for (int64_t first = 0; first < job->elements && job->what == DONE; first += window) {
        int64_t n = job->elements - first < window ? job->elements - first : window;
        if (open_windows(job, first, n) == 0)
            mean_of_windows(job, first, n);
        close_windows(job);
        if (job->lost)
            fail(job, LOST, job->lost - 1, 0);
    }
    current = NULL;
    fesetenv(&kept);
}

/* ---- what Python sees -------------------------------------------------------------------------------------------- */

static int refuse(const char *what)
{
    PyErr_SetString(PyExc_ValueError, what);
    return -1;
}

/* Whether [position, position + count * size) is inside a buffer, in exact arithmetic. */
static int is_inside(int64_t position, int64_t count, int64_t size, int64_t length)
{
    return position >= 0 && count >= 0 && position <= length && count <= (length - position) / size;
}

static int check_mean(const struct job *job, const Py_buffer *table, const Py_buffer *weights, const Py_buffer *memory,
                      const Py_buffer *output)
{
    if (job->number < 1 || job->number > 1 << 26 || table->len % (int64_t)sizeof(struct input) || (uintptr_t)table->buf % 8)
        return refuse("the table has no inputs, too many, or parts of them");
    if (weights->len && weights->len != job->number * (int64_t)sizeof(double))
        return refuse("not one weight for each input");
    if (job->dtype < 0 || job->dtype >= DTYPES)
        return refuse("no such output dtype");
    if (!is_inside(0, job->elements, sizes[job->dtype], output->len))
        return refuse("the output is too small");
    if (job->slot < 8)
        return refuse("a slot is too small");
    for (int64_t i = 0; i < job->number; i++) {
        struct input *input = &job->inputs[i];
        input->address = input->mapping = input->nmapping = 0;
        if (input->dtype < 0 || input->dtype >= DTYPES)
            return refuse("no such input dtype");
        if (input->where < MEMORY || input->where > READ || !is_inside(input->offset, job->elements, 8, INT64_MAX))
            return refuse("no such place");
        if (input->where != MAP && !is_inside(input->position, job->slot, 1, memory->len))
            return refuse("the memory is too small");
        if (input->where == MEMORY && !is_inside(0, job->elements, sizes[input->dtype], job->slot))
            return refuse("an input is larger than its slot");
    }
    return 0;
}

PyDoc_STRVAR(mean_text, "mean(table, weights, memory, slot, elements, dtype, output, check) -> (what, index, code, "
                        "value)\n\nSee native.py. Without weights, all inputs count the same.");

static PyObject *py_mean(PyObject *module, PyObject *arguments)
{
    (void)module;
    Py_buffer table, weights, memory, output;
    Py_ssize_t slot, elements;
    struct job job = {0};
    if (!PyArg_ParseTuple(arguments, "w*y*w*nniw*i", &table, &weights, &memory, &slot, &elements, &job.dtype, &output,
                          &job.check))
        return NULL;
    job.inputs = table.buf;
    job.weights = weights.len ? weights.buf : NULL;
    job.number = table.len / (Py_ssize_t)sizeof(struct input);
    job.memory = memory.buf, job.output = output.buf;
    job.slot = slot, job.elements = elements;
    PyObject *result = NULL;
    if (check_mean(&job, &table, &weights, &memory, &output) == 0) {
        if (watch_faults() != 0) {
            PyErr_SetFromErrno(PyExc_OSError);
        } else {
            Py_BEGIN_ALLOW_THREADS
            compute(&job);
            Py_END_ALLOW_THREADS
            result = Py_BuildValue("iLLd", job.what, (long long)job.index, (long long)job.code, job.value);
        }
    }
    PyBuffer_Release(&table);
    PyBuffer_Release(&weights);
    PyBuffer_Release(&memory);
    PyBuffer_Release(&output);
    return result;
}

#include "kernel_copy.h"

PyDoc_STRVAR(nonfinite_text, "nonfinite(values, dtype, width, infinities) -> (count, first)\n\n"
                             "Counts the elements, of `width` values each, with NaN, or with NaN or Inf; first is "
                             "the index of the first of them, -1 if there is none.");

static PyObject *py_nonfinite(PyObject *module, PyObject *arguments)
{
    (void)module;
    Py_buffer values;
    int dtype, width, infinities;
    if (!PyArg_ParseTuple(arguments, "y*iip", &values, &dtype, &width, &infinities))
        return NULL;
    if (dtype < 0 || dtype >= DTYPES || width < 1) {
        PyBuffer_Release(&values);
        refuse("no such dtype or width");
        return NULL;
    }
    int64_t found = 0, last = -1, first = -1, number = values.len / sizes[dtype];
    struct input input = {.address = (intptr_t)values.buf, .dtype = dtype};
    Py_BEGIN_ALLOW_THREADS
    for (int64_t begin = 0; begin < number; begin += BLOCK) {
        double wide[BLOCK];
        int64_t n = number - begin < BLOCK ? number - begin : BLOCK;
        load(&input, (size_t)begin, (size_t)n, wide);
        for (int64_t i = 0; i < n; i++) {
            int64_t element = (begin + i) / width;
            int64_t magnitude = bits_of(wide[i]) & MAGNITUDE;
            if (element != last && (magnitude > INFINITE || (infinities && magnitude == INFINITE))) {
                first = found == 0 ? element : first;
                last = element;
                found++;
            }
        }
    }
    Py_END_ALLOW_THREADS
    PyBuffer_Release(&values);
    return Py_BuildValue("LL", (long long)found, (long long)first);
}

static int start(PyObject *module)
{
    choose_instructions();
    static const struct {
        const char *name;
        int value;
    } constants[] = {
        {"MEMORY", MEMORY},         {"MAP", MAP},         {"READ", READ},           {"DONE", DONE},
        {"NOT_FINITE", NOT_FINITE}, {"LOST", LOST},       {"OUT_OF_RANGE", OUT_OF_RANGE},
        {"NOT_MAPPED", NOT_MAPPED}, {"NOT_READ", NOT_READ}, {"CHECK_FINITE", CHECK_FINITE},
        {"CHECK_RANGE", CHECK_RANGE}, {"ROW", (int)sizeof(struct input)},
    };
    for (size_t i = 0; i < sizeof constants / sizeof *constants; i++)
        if (PyModule_AddIntConstant(module, constants[i].name, constants[i].value) != 0)
            return -1;
    PyObject *dtypes = PyDict_New();
    for (int i = 0; dtypes != NULL && i < DTYPES; i++) {
        PyObject *code = PyLong_FromLong(i);
        if (code == NULL || PyDict_SetItemString(dtypes, names[i], code) != 0)
            Py_CLEAR(dtypes);
        Py_XDECREF(code);
    }
    int failed = dtypes == NULL || PyModule_AddObjectRef(module, "DTYPES", dtypes) != 0;
    Py_XDECREF(dtypes);
    return failed ? -1 : 0;
}

static PyMethodDef methods[] = {
    {"mean", py_mean, METH_VARARGS, mean_text},
    {"copy", py_copy, METH_VARARGS, copy_text},
    {"nonfinite", py_nonfinite, METH_VARARGS, nonfinite_text},
    {NULL, NULL, 0, NULL},
};

static PyModuleDef_Slot slots[] = {
    {Py_mod_exec, (void *)start},
#ifdef Py_mod_gil
    {Py_mod_gil, Py_MOD_GIL_NOT_USED},
#endif
    {0, NULL},
};

static struct PyModuleDef definition = {
    PyModuleDef_HEAD_INIT, .m_name = "_kernel", .m_doc = "The native engine.", .m_methods = methods, .m_slots = slots,
};

PyMODINIT_FUNC PyInit__kernel(void) { return PyModuleDef_Init(&definition); }
