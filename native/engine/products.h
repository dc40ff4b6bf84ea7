// Products of rows of activations with linear layers: what one thread does of them.
#pragma once

#include <vector>

#include "kernels.h"
#include "pool.h"

namespace bitpress {

// How the columns of sixteen-bit weights are cut for products with 8-bit activations.
Cut flat_cut(int columns);
// out[row][16] += a strip of one factor of a low-rank term times rows of x, of its `width()`
void add_factor(const Kernels &kernels, const Factor &factor, int strip, const float *x, int rows, float *out);

// One output of a phase: rows [row * stride + output feature].
struct Product {
    const Linear *linear;
    float *out;
    int stride;
};

// What products of one input need of it: the rows themselves and, made once, their bytes or padded floats for every cut, and the
// inner vectors of low-rank terms.
class Input {
  public:
    // Makes room for `rows` rows and every form that these linears want. Called by one thread.
    void plan(const Kernels &kernels, const std::vector<const Linear *> &linears, int rows, bool bytes);
    // Fills every form of one row. Different threads may fill different rows. Says whether every scale of the model's own rounding is finite.
    bool prepare(const Kernels &kernels, const float *x, int row);

    struct Key {
        enum Kind { direct, tiled, halved, integers, floats, mapped, inner } kind;
        Cut cut;
        const InputMap *map = nullptr;      // that the row has been through, or null
        const Linear *linear = nullptr;     // whose low-rank term it is, or null
        const int32_t *picked = nullptr;    // of the row's columns, or null for all
        std::optional<Rounding> rounding = {};  // the model's own: floats are the values that its codes stand for
        bool operator==(const Key &) const = default;
    };
    struct Form : Key {
        IntegerRows whole;
        Quantized quantized;
        Tiled tiles;
        HalfRows halves;
        Aligned<float> values;  // [row][width]
        int width;
        bool passing;  // mapped rows that only other forms are made of: each thread has one, and no product reads it
    };
    const Form &find(const Key &key) const;
    int rows() const { return rows_; }
    bool bytes() const { return bytes_; }
    // How products of many rows read a row: in bytes, or in bf16 where the processor has tiles for it.
    static Key::Kind many(const Kernels &kernels) { return kernels.half_product != nullptr ? Key::halved : Key::tiled; }
    // Values that stand apart, of all rows and forms.
    int64_t apart() const;
    int64_t values() const;

  private:
    void want(const Kernels &kernels, const Key &key, bool passing = false);
    const float *row_of(const InputMap *map, const std::optional<Rounding> &rounding, const float *x, int row);
    float *place(size_t form, int row);
    std::vector<Form> forms_;
    size_t used_ = 0;
    int rows_ = 0;
    bool bytes_ = true;
    std::vector<const Linear *> planned_;
};

// What a matrix of codes reads of an input: whole numbers where they are summed, else what `kind` says.
inline Input::Key key_of(Input::Key::Kind kind, const Linear &l, const Coded &m) {
    return {m.whole_sums ? Input::Key::integers : kind, m.cut, l.map.get(), nullptr, m.picked.data(), l.rounding};
}

// Memory of one thread for tiles and panels.
struct Scratch {
    Aligned<int8_t> tiles;
    Aligned<uint8_t> known;
    Aligned<uint16_t> halves;
    Aligned<float> scales, panel, single, out, attention;
    std::vector<float> queries;
};

// The gated half of an MLP, many rows: out = act(gate @ x) * (up @ x), a strip of both at a time.
struct Gated {
    const Linear *gate, *up;
    float *out;
    int stride;
    bool tanh_gelu;
};
void multiply_gated(const Kernels &kernels, Pool &pool, int thread, const Gated &product, const Input &input, Scratch &scratch);

// This thread's share of the products of `input`, handed out by the pool. The caller waits afterwards.
void multiply(const Kernels &kernels, Pool &pool, int thread, const std::vector<Product> &products, const Input &input,
              Scratch &scratch);

// The maps of the products' outputs, once all threads have multiplied; some rows for each of them. Waits where there are such maps.
void map_outputs(const Kernels &kernels, Pool &pool, int thread, const std::vector<Product> &products, int rows);

}  // namespace bitpress
