/* Copies tensors whose elements are not consecutive. Part of kernel.c. */

#define MOST_DIMENSIONS 64 /* of extents above one, more than 2**64 elements need */
#define TILE 32            /* both sides of a tile stay in the cache: one is read, the other written, across its rows */

struct box {
    int dimensions;
    int64_t extent[MOST_DIMENSIONS], from[MOST_DIMENSIONS], to[MOST_DIMENSIONS]; /* steps in elements */
};

#define DEFINE_COPY(BITS)                                                                                              \
    static void copy_##BITS(const struct box *box, const char *source, char *target)                                   \
    {                                                                                                                  \
        int row = box->dimensions - 2, column = box->dimensions - 1;                                                   \
        int64_t rows = box->extent[row], columns = box->extent[column];                                                \
        for (int64_t r = 0; r < rows; r += TILE)                                                                       \
            for (int64_t c = 0; c < columns; c += TILE)                                                                \
                for (int64_t i = r; i < rows && i < r + TILE; i++)                                                     \
                    for (int64_t j = c; j < columns && j < c + TILE; j++)                                              \
                        ((u##BITS *)target)[i * box->to[row] + j * box->to[column]] =                                  \
                            ((const u##BITS *)source)[i * box->from[row] + j * box->from[column]];                     \
    }
DEFINE_COPY(8)
DEFINE_COPY(16)
DEFINE_COPY(32)
DEFINE_COPY(64)

static void copy_box(const struct box *box, int dimension, const char *source, char *target, int64_t size)
{
    if (dimension < box->dimensions - 2) {
        for (int64_t i = 0; i < box->extent[dimension]; i++)
            copy_box(box, dimension + 1, source + i * box->from[dimension] * size,
                     target + i * box->to[dimension] * size, size);
        return;
    }
    (size == 1 ? copy_8 : size == 2 ? copy_16 : size == 4 ? copy_32 : copy_64)(box, source, target);
}

/* Reads the box from tuples; finds the first and the last element of both sides. */
static int read_box(struct box *box, PyObject *extents, PyObject *from, PyObject *to, int64_t last[2])
{
    Py_ssize_t dimensions = PyTuple_Size(extents);
    if (dimensions < 0 || PyTuple_Size(from) != dimensions || PyTuple_Size(to) != dimensions)
        return PyErr_Occurred() ? -1 : refuse("extents and steps of different lengths");
    last[0] = last[1] = 0;
    box->dimensions = 0;
    for (Py_ssize_t i = 0; i < dimensions; i++) {
        int64_t values[3];
        PyObject *tuples[3] = {extents, from, to};
        for (int k = 0; k < 3; k++) {
            values[k] = PyLong_AsLongLong(PyTuple_GetItem(tuples[k], i));
            if (values[k] == -1 && PyErr_Occurred())
                return -1;
        }
        if (values[0] < 1 || values[1] < 0 || values[2] < 0)
            return refuse("an extent or a step is out of range");
        if (values[0] == 1)
            continue;
        if (box->dimensions == MOST_DIMENSIONS - 2)
            return refuse("too many dimensions");
        for (int k = 0; k < 2; k++) {
            int64_t step = values[1 + k], span;
            if (__builtin_mul_overflow(values[0] - 1, step, &span) || __builtin_add_overflow(last[k], span, &last[k]))
                return refuse("a box is too large");
        }
        box->extent[box->dimensions] = values[0];
        box->from[box->dimensions] = values[1];
        box->to[box->dimensions++] = values[2];
    }
    return 0;
}

/* Puts the dimension with the smallest step in the source before the last, so that tiles read along it; adds dimensions
 * of extent one until there are two. */
static void order_box(struct box *box)
{
    for (; box->dimensions < 2; box->dimensions++) {
        int last = box->dimensions;
        box->extent[last] = 1, box->from[last] = 0, box->to[last] = 0;
    }
    int row = box->dimensions - 2, fast = row;
    for (int i = 0; i < row; i++)
        fast = box->from[i] < box->from[fast] ? i : fast;
    int64_t *const of[3] = {box->extent, box->from, box->to};
    for (int k = 0; k < 3; k++) {
        int64_t kept = of[k][row];
        of[k][row] = of[k][fast];
        of[k][fast] = kept;
    }
}

PyDoc_STRVAR(copy_text, "copy(source, begin, target, start, extents, from_steps, to_steps, size)\n\n"
                        "Copies a box of elements of `size` bytes. Begins are in bytes, steps in elements, never "
                        "negative; extents are at least one.");

static PyObject *py_copy(PyObject *module, PyObject *arguments)
{
    (void)module;
    Py_buffer source, target;
    Py_ssize_t begin, start;
    PyObject *extents, *from, *to;
    int size;
    if (!PyArg_ParseTuple(arguments, "y*nw*nOOOi", &source, &begin, &target, &start, &extents, &from, &to, &size))
        return NULL;
    struct box box;
    int64_t last[2];
    int failed = read_box(&box, extents, from, to, last);
    if (!failed && size != 1 && size != 2 && size != 4 && size != 8)
        failed = refuse("elements have 1, 2, 4 or 8 bytes");
    if (!failed && (last[0] == INT64_MAX || !is_inside(begin, last[0] + 1, size, source.len)))
        failed = refuse("the box is not inside the source");
    if (!failed && (last[1] == INT64_MAX || !is_inside(start, last[1] + 1, size, target.len)))
        failed = refuse("the box is not inside the target");
    if (!failed) {
        order_box(&box);
        Py_BEGIN_ALLOW_THREADS
        copy_box(&box, 0, (const char *)source.buf + begin, (char *)target.buf + start, size);
        Py_END_ALLOW_THREADS
    }
    PyBuffer_Release(&source);
    PyBuffer_Release(&target);
    if (failed)
        return NULL;
    Py_RETURN_NONE;
}
